"""Parameter groups: which parameter gets which learning rate, weight decay and time window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from convlens import models, optim, recipe
from convlens.errors import UsageError
from convlens.models.cnn import CNN
from convlens.models.stages import freeze
from convlens.optim.param_groups import split_parameters
from convlens.recipe import OptimConfig
from convlens.training.resolve import validate_recipe


def network() -> CNN:
    """Stages 1 to 3 of convolution and norm, a dense layer, the classifier."""
    return CNN(3, 1, 8, widths=[2, 3, 4], hidden=5)


def by_name(model: nn.Module, key: str, **options: Any) -> dict[str, Any]:
    """The value of `key` in each parameter's group."""
    optimizer = optim.build_optimizer(model, OptimConfig(**options))
    values = {id(p): group[key] for group in optimizer.param_groups for p in group["params"]}
    return {name: values[id(p)] for name, p in model.named_parameters() if id(p) in values}


def having(values: dict[str, Any], expected: Any) -> set[str]:
    """The names of the parameters with the expected value."""
    return {name for name, value in values.items() if value == pytest.approx(expected)}


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ("head", {"classifier.weight", "classifier.bias"}),
        ("norms", {f"stage{i}.2.{p}" for i in (1, 2, 3) for p in ("weight", "bias")}),
        ("norms.bias", {f"stage{i}.2.bias" for i in (1, 2, 3)}),
        (
            "biases",
            {*(f"stage{i}.2.bias" for i in (1, 2, 3)), "dense.hidden.bias", "classifier.bias"},
        ),
        ("filters", {f"stage{i}.0.weight" for i in (1, 2, 3)}),
        ("dense.*", {"dense.hidden.weight", "dense.hidden.bias"}),
        ("stage?.0.*", {f"stage{i}.0.weight" for i in (1, 2, 3)}),
        ("stage1.2.bias", {"stage1.2.bias"}),
        ("*", {name for name, _ in network().named_parameters()}),
    ],
)
def test_keywords_and_patterns_select_these_parameters(params: str, names: set[str]) -> None:
    found = by_name(network(), "lr", lr=0.1, groups=[{"params": params, "lr": 0.7}])
    assert having(found, 0.7) == names
    assert having(found, 0.1) == set(found) - names


def test_the_first_matching_group_applies_and_the_recipe_sets_everything_else() -> None:
    options: dict[str, Any] = {
        "name": "sgd",
        "lr": 0.1,
        "weight_decay": 0.01,
        "momentum": 0.8,
        "nesterov": True,
        "decay_bias_and_norm": False,
        "groups": [
            {"params": "stage1.2.bias", "lr": 0.2, "momentum": 0.0},
            {"params": "norms.bias", "weight_decay": 0.5},
            {"params": "head", "end": 0.5},
        ],
    }
    lr = by_name(network(), "lr", **options)
    decay = by_name(network(), "weight_decay", **options)
    momentum = by_name(network(), "momentum", **options)
    nesterov = by_name(network(), "nesterov", **options)
    window = by_name(network(), "window", **options)
    assert having(lr, 0.2) == {"stage1.2.bias"}
    assert having(momentum, 0.0) == {"stage1.2.bias"}
    assert having(nesterov, False) == {"stage1.2.bias"}  # torch refuses it without momentum
    # A weight decay set by a group applies in spite of `decay_bias_and_norm`.
    assert having(decay, 0.5) == {"stage2.2.bias", "stage3.2.bias"}
    assert having(decay, 0.0) == {
        "stage1.2.bias",
        "classifier.bias",
        "dense.hidden.bias",
        *(f"stage{i}.2.weight" for i in (1, 2, 3)),
    }
    assert {n for n, w in window.items() if w == (0.0, 0.5)} == {
        "classifier.weight",
        "classifier.bias",
    }


def test_parameters_with_equal_options_share_a_group() -> None:
    """One fused kernel for all; a `head` entry with the recipe's learning rate adds no group."""
    groups = split_parameters(
        network(), OptimConfig(lr=0.1, groups=[{"params": "head", "lr": 0.1}])
    )
    assert [len(group["params"]) for group in groups] == [len(list(network().parameters()))]
    assert (
        len(
            split_parameters(network(), OptimConfig(lr=0.1, groups=[{"params": "head", "lr": 0.2}]))
        )
        == 2
    )


def test_layer_decay_reduces_learning_rates_from_the_head_backwards() -> None:
    found = by_name(
        network(), "lr", lr=0.8, layer_decay=0.5, groups=[{"params": "norms.bias", "lr": 1.6}]
    )
    assert having(found, 0.8) == {
        "dense.hidden.weight",
        "dense.hidden.bias",
        "classifier.weight",
        "classifier.bias",
        "stage3.2.bias",
    }
    assert having(found, 0.4) == {"stage3.0.weight", "stage3.2.weight", "stage2.2.bias"}
    assert having(found, 0.2) == {"stage2.0.weight", "stage2.2.weight", "stage1.2.bias"}
    assert having(found, 0.1) == {"stage1.0.weight", "stage1.2.weight"}


def test_head_first_delays_everything_but_the_head() -> None:
    found = by_name(
        network(), "window", head_first=0.25, groups=[{"params": "stage3.*", "start": 0.5}]
    )
    expected = {"classifier": (0.0, 1.0), "stage3": (0.5, 1.0)}
    for name, window in found.items():
        assert window == expected.get(name.partition(".")[0], (0.25, 1.0)), name


def test_muon_updates_filters_unless_a_group_sets_it() -> None:
    """Filters are updated by Muon with `lr`, everything else by SGD with `aux_lr`."""
    options: dict[str, Any] = {"name": "muon", "lr": 0.24, "aux_lr": 0.05}
    model = network()
    filters = {f"stage{i}.0.weight" for i in (1, 2, 3)}
    assert having(by_name(model, "muon", **options), True) == filters
    assert having(by_name(model, "lr", **options), 0.24) == filters
    assert having(by_name(model, "lr", **options), 0.05) == set(by_name(model, "lr")) - filters
    assert having(by_name(model, "lr", name="muon", lr=0.24), 0.24) == set(by_name(model, "lr"))
    options["groups"] = [
        {"params": "stage1.0.weight", "muon": False},
        {"params": "dense.hidden.weight", "muon": True},
        {"params": "biases", "lr": 0.01},
    ]
    found = by_name(model, "muon", **options)
    assert having(found, True) == {"stage2.0.weight", "stage3.0.weight", "dense.hidden.weight"}
    rates = by_name(model, "lr", **options)
    assert rates["stage1.0.weight"] == 0.05
    assert rates["dense.hidden.weight"] == 0.24
    assert having(rates, 0.01) == {n for n in rates if n.endswith("bias")}


def test_muon_does_not_update_a_head_that_is_a_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3))
    model.head = "1"  # type: ignore[assignment]
    found = by_name(model, "muon", name="muon")
    assert having(found, True) == {"0.weight"}


# Errors


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"params": "heads"}], "'heads' matches no parameter .did you mean head"),
        ([{"params": "stage1.0.wieght"}], "did you mean stage1.0.weight"),
        ([{"params": "stage1"}], r"did you mean stage1"),
        (
            [{"params": "head"}, {"params": "classifier.*"}],
            "matches only parameters of earlier groups",
        ),
        ([{"params": "head", "start": 0.5, "end": 0.5}], "start=0.5 is not before end=0.5"),
        ([{"params": "head", "momentum": 0.5}], "momentum is a key of sgd and muon, not of adamw"),
        ([{"params": "filters", "muon": True}], "muon=true needs optim.name=muon"),
        ([{"params": "*", "end": 0.5}], "nothing is trained from 50% to 100%"),
        ([{"params": "head", "end": 0.3}, {"params": "*", "start": 0.6}], "from 30% to 60%"),
        ([{"params": "*", "start": 0.1}], "nothing is trained from 0% to 10%"),
    ],
)
def test_invalid_groups_are_usage_errors(groups: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        optim.build_optimizer(network(), OptimConfig(groups=groups))
    assert "head, norms, norms.bias, biases, filters" in caught.value.fix


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"head_first": 0.5, "groups": [{"params": "stage1.*", "end": 0.4}]},
            "'stage1.0.weight' is trained until 40%, but optim.head_first=0.5",
        ),
        (
            {"name": "muon", "groups": [{"params": "biases", "muon": True}]},
            "muon=true for 'stage1.2.bias'",
        ),
    ],
)
def test_contradicting_keys_are_usage_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        optim.build_optimizer(network(), OptimConfig(**options))


def test_frozen_parameters_are_in_no_group() -> None:
    model = network()
    model.stage1.requires_grad_(False)
    assert not {name for name in by_name(model, "lr") if name.startswith("stage1")}
    with pytest.raises(UsageError, match=r"'stage1\.\*' matches frozen parameters only"):
        optim.build_optimizer(model, OptimConfig(groups=[{"params": "stage1.*"}]))
    with pytest.raises(UsageError, match="no parameter of the network is trainable"):
        optim.build_optimizer(model.requires_grad_(False), OptimConfig())
    half = network()
    half.classifier.requires_grad_(False)
    with pytest.raises(UsageError, match="nothing is trained from 0% to 20%"):
        optim.build_optimizer(half, OptimConfig(head_first=0.2))


def test_invalid_groups_of_a_recipe_are_reported_before_any_image_is_read() -> None:
    loaded = recipe.load_recipe(
        "digits",
        [
            "optim.groups=[{params: haed}, {params: head, start: 0.5, end: 0.2}]",
            "optim.schedule=lineer",
            "optim.ema=0.9",
            "optim.lookahead={}",
        ],
    )
    with pytest.raises(UsageError) as caught:
        validate_recipe(loaded)
    for message in ("did you mean head", "start=0.5", "lineer", "optim.lookahead"):
        assert message in caught.value.what


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.groups=[{params: head, lr: 0}]", "optim.groups.0.lr=0: "),
        ("optim.groups=[{params: head}, {params: '*', start: 1}]", "optim.groups.1.start=1: "),
        ("optim.groups=[{params: head, rate: 1}]", "unknown key 'optim.groups.0.rate'"),
        ("optim.groups=[{lr: 1}]", "optim.groups.0.params="),
        ("optim.groups=head", "optim.groups='head'"),
        ("optim.lookahead={every: 0}", "optim.lookahead.every=0"),
        ("optim.layer_decay=0", "optim.layer_decay=0"),
        ("optim.head_first=1", "optim.head_first=1"),
        ("optim.muon_iterations=0", "optim.muon_iterations=0"),
    ],
)
def test_invalid_values_are_reported_with_their_key(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=None) as caught:
        recipe.load_recipe("digits", [override])
    assert message in caught.value.what


def test_groups_are_kept_when_a_recipe_is_saved_and_loaded() -> None:
    loaded = recipe.load_recipe(
        "digits",
        ["optim.groups=[{params: '*.bias', lr: 0.5, end: 0.25}]", "optim.lookahead={every: 7}"],
    )
    again = recipe.load_recipe(loaded.model_dump(mode="json"))
    assert again == loaded
    assert again.optim.groups[0].end == 0.25
    assert again.optim.lookahead is not None
    assert again.optim.lookahead.every == 7
    assert again.digest() == loaded.digest() != recipe.load_recipe("digits").digest()


def test_without_gradient_there_is_no_update_and_no_state() -> None:
    """Windows rely on this: weight decay and moments stop too, in every optimizer."""
    for name in optim.OPTIMIZERS:
        model = network()
        config = OptimConfig(name=name, lr=0.1, weight_decay=0.1)
        optimizer = optim.build_optimizer(model, config)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        model.stage2.requires_grad_(False)
        model(torch.randn(4, 1, 8, 8)).square().mean().backward()
        optimizer.step()
        for n, p in model.named_parameters():
            assert torch.equal(before[n], p) == n.startswith("stage2."), (name, n)
            assert bool(optimizer.state[p]) != n.startswith("stage2."), (name, n)


# The stage table


def resnet18(trainable: str = "all") -> nn.Module:
    torch.manual_seed(0)
    model = models.build_model("resnet18", 4, 3, 32, {"stem": "imagenet"})
    freeze(model, trainable)
    return model


def test_the_stage_table_has_trainable_parameters_rates_and_times() -> None:
    model = resnet18("layer3+")
    config = OptimConfig(name="sgd", lr=0.1, layer_decay=0.5, head_first=0.25)
    rows = optim.stage_table(model, optim.build_optimizer(model, config))
    cells = [row.cells() for row in rows]
    assert cells == [
        ("maxpool", "9,536", "frozen", "", ""),
        ("layer1", "147,968", "frozen", "", ""),
        ("layer2", "525,568", "frozen", "", ""),
        ("layer3", "2,099,712", "2,099,712", "0.025", "25% to 100%"),
        ("layer4", "8,393,728", "8,393,728", "0.05", "25% to 100%"),
        ("fc", "2,052", "2,052", "0.1", "all of it"),
    ]
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())


def test_a_stage_with_several_rates_shows_the_lowest_and_the_highest() -> None:
    model = resnet18()
    groups = [{"params": "layer1.0.*", "lr": 0.3}, {"params": "layer1.1.bn1.*", "lr": 0.2}]
    config = OptimConfig(name="sgd", lr=0.1, groups=groups)
    row = optim.stage_table(model, optim.build_optimizer(model, config))[1]
    assert row.cells()[3] == "0.1 to 0.3"
