"""Parameter groups: which parameter gets which rate, decay and time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from convlens import optim, recipe
from convlens.errors import UsageError
from convlens.models.cnn import CNN
from convlens.optim.param_groups import split_parameters
from convlens.recipe import OptimConfig
from convlens.training.resolve import validate_recipe


def network() -> CNN:
    """Stages 1 to 3 of convolution and norm, a dense layer, the classifier."""
    return CNN(3, 1, 8, widths=[2, 3, 4], hidden=5)


def by_name(model: nn.Module, key: str, **options: Any) -> dict[str, Any]:
    """What each parameter's group says under `key`."""
    optimizer = optim.build_optimizer(model, OptimConfig(**options))
    held = {id(p): group[key] for group in optimizer.param_groups for p in group["params"]}
    return {name: held[id(p)] for name, p in model.named_parameters() if id(p) in held}


def those(found: dict[str, Any], value: Any) -> set[str]:
    return {name for name, its in found.items() if its == pytest.approx(value)}


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
def test_words_and_patterns_mean_these_parameters(params: str, names: set[str]) -> None:
    found = by_name(network(), "lr", lr=0.1, groups=[{"params": params, "lr": 0.7}])
    assert those(found, 0.7) == names
    assert those(found, 0.1) == set(found) - names


def test_the_first_group_that_matches_counts_and_leaves_the_rest_to_the_recipe() -> None:
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
    assert those(lr, 0.2) == {"stage1.2.bias"}
    assert those(momentum, 0.0) == {"stage1.2.bias"}
    assert those(nesterov, False) == {"stage1.2.bias"}  # torch refuses it without momentum
    # A decay that is stated is meant, whatever `decay_bias_and_norm` says of the others.
    assert those(decay, 0.5) == {"stage2.2.bias", "stage3.2.bias"}
    assert those(decay, 0.0) == {
        "stage1.2.bias",
        "classifier.bias",
        "dense.hidden.bias",
        *(f"stage{i}.2.weight" for i in (1, 2, 3)),
    }
    assert {n for n, w in window.items() if w == (0.0, 0.5)} == {
        "classifier.weight",
        "classifier.bias",
    }


def test_parameters_with_equal_settings_share_a_group() -> None:
    """One fused kernel for all of them: `head` with the recipe's own rate is no other group."""
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


def test_layer_decay_falls_from_the_head_back() -> None:
    found = by_name(
        network(), "lr", lr=0.8, layer_decay=0.5, groups=[{"params": "norms.bias", "lr": 1.6}]
    )
    assert those(found, 0.8) == {
        "dense.hidden.weight",
        "dense.hidden.bias",
        "classifier.weight",
        "classifier.bias",
        "stage3.2.bias",
    }
    assert those(found, 0.4) == {"stage3.0.weight", "stage3.2.weight", "stage2.2.bias"}
    assert those(found, 0.2) == {"stage2.0.weight", "stage2.2.weight", "stage1.2.bias"}
    assert those(found, 0.1) == {"stage1.0.weight", "stage1.2.weight"}


def test_head_first_opens_everything_else_later() -> None:
    found = by_name(
        network(), "window", head_first=0.25, groups=[{"params": "stage3.*", "start": 0.5}]
    )
    expected = {"classifier": (0.0, 1.0), "stage3": (0.5, 1.0)}
    for name, window in found.items():
        assert window == expected.get(name.partition(".")[0], (0.25, 1.0)), name


def test_muons_rules_go_by_kind_unless_a_group_says_otherwise() -> None:
    """Filters by Muon at `lr`; all else by SGD at `aux_lr`; the head never by itself."""
    options: dict[str, Any] = {"name": "muon", "lr": 0.24, "aux_lr": 0.05}
    model = network()
    filters = {f"stage{i}.0.weight" for i in (1, 2, 3)}
    assert those(by_name(model, "muon", **options), True) == filters
    assert those(by_name(model, "lr", **options), 0.24) == filters
    assert those(by_name(model, "lr", **options), 0.05) == set(by_name(model, "lr")) - filters
    assert those(by_name(model, "lr", name="muon", lr=0.24), 0.24) == set(by_name(model, "lr"))
    options["groups"] = [
        {"params": "stage1.0.weight", "muon": False},
        {"params": "dense.hidden.weight", "muon": True},
        {"params": "biases", "lr": 0.01},
    ]
    found = by_name(model, "muon", **options)
    assert those(found, True) == {"stage2.0.weight", "stage3.0.weight", "dense.hidden.weight"}
    rates = by_name(model, "lr", **options)
    assert rates["stage1.0.weight"] == 0.05
    assert rates["dense.hidden.weight"] == 0.24
    assert those(rates, 0.01) == {n for n in rates if n.endswith("bias")}


def test_a_head_that_is_a_convolution_is_not_for_muon() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3))
    model.head = "1"  # type: ignore[assignment]
    found = by_name(model, "muon", name="muon")
    assert those(found, True) == {"0.weight"}


# Bad input


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        ([{"params": "heads"}], "'heads' matches no parameter .did you mean head"),
        ([{"params": "stage1.0.wieght"}], "did you mean stage1.0.weight"),
        ([{"params": "stage1"}], r"did you mean stage1"),
        ([{"params": "head"}, {"params": "classifier.*"}], "only what groups before it take"),
        ([{"params": "head", "start": 0.5, "end": 0.5}], "start=0.5 is not before end=0.5"),
        ([{"params": "head", "momentum": 0.5}], "momentum is a key of sgd and muon, not of adamw"),
        ([{"params": "filters", "muon": True}], "muon=true goes with optim.name=muon only"),
        ([{"params": "*", "end": 0.5}], "nothing trains from 50% to 100%"),
        ([{"params": "head", "end": 0.3}, {"params": "*", "start": 0.6}], "from 30% to 60%"),
        ([{"params": "*", "start": 0.1}], "nothing trains from 0% to 10%"),
    ],
)
def test_groups_that_cannot_be_are_refused(groups: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        optim.build_optimizer(network(), OptimConfig(groups=groups))
    assert "head, norms, norms.bias, biases, filters" in caught.value.fix


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"head_first": 0.5, "groups": [{"params": "stage1.*", "end": 0.4}]},
            "'stage1.0.weight' trains up to 40%, but optim.head_first=0.5",
        ),
        (
            {"name": "muon", "groups": [{"params": "biases", "muon": True}]},
            "muon=true for 'stage1.2.bias'",
        ),
    ],
)
def test_keys_that_exclude_each_other_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        optim.build_optimizer(network(), OptimConfig(**options))


def test_frozen_parameters_are_in_no_group_and_cannot_be_all_that_is_asked_for() -> None:
    model = network()
    model.stage1.requires_grad_(False)
    assert not {name for name in by_name(model, "lr") if name.startswith("stage1")}
    with pytest.raises(UsageError, match=r"'stage1\.\*' matches frozen parameters only"):
        optim.build_optimizer(model, OptimConfig(groups=[{"params": "stage1.*"}]))
    with pytest.raises(UsageError, match="no parameter of the network is trainable"):
        optim.build_optimizer(model.requires_grad_(False), OptimConfig())
    half = network()
    half.classifier.requires_grad_(False)
    with pytest.raises(UsageError, match="nothing trains from 0% to 20%"):
        optim.build_optimizer(half, OptimConfig(head_first=0.2))


def test_a_recipe_is_refused_before_any_image_is_read() -> None:
    asked = recipe.load_recipe(
        "digits",
        [
            "optim.groups=[{params: haed}, {params: head, start: 0.5, end: 0.2}]",
            "optim.schedule=lineer",
            "optim.ema=0.9",
            "optim.lookahead={}",
        ],
    )
    with pytest.raises(UsageError) as caught:
        validate_recipe(asked)
    for told in ("did you mean head", "start=0.5", "lineer", "optim.lookahead"):
        assert told in caught.value.what


@pytest.mark.parametrize(
    ("override", "told"),
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
def test_values_that_cannot_be_are_named_with_their_place(override: str, told: str) -> None:
    with pytest.raises(UsageError, match=None) as caught:
        recipe.load_recipe("digits", [override])
    assert told in caught.value.what


def test_groups_survive_a_recipes_text() -> None:
    asked = recipe.load_recipe(
        "digits",
        ["optim.groups=[{params: '*.bias', lr: 0.5, end: 0.25}]", "optim.lookahead={every: 7}"],
    )
    again = recipe.load_recipe(asked.model_dump(mode="json"))
    assert again == asked
    assert again.optim.groups[0].end == 0.25
    assert again.optim.lookahead is not None
    assert again.optim.lookahead.every == 7
    assert again.digest() == asked.digest() != recipe.load_recipe("digits").digest()


def test_no_gradient_no_step_no_state(tmp_path: Any) -> None:
    """What windows rely on, for every optimiser there is: decay and moments stop, too."""
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
