"""The command `serve`, which answers requests for predictions."""

from __future__ import annotations

from typing import Annotated

import typer

from convlens.cli.common import (
    Command,
    ConfidenceOption,
    DeviceOption,
    HostOption,
    MaxPixelsOption,
    MinAccuracyOption,
    PredictionSetOption,
    RunArgument,
    TrustCode,
    app,
    parse_share_option,
)


@app.command(cls=Command)
def serve(
    run: RunArgument,
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="Port; 0: any free one.")
    ] = 8000,
    host: HostOption = "127.0.0.1",
    allow_remote: Annotated[
        bool,
        typer.Option(
            "--allow-remote",
            help="Let other machines use the model, without encryption; needs --host and --token.",
        ),
    ] = False,
    token: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            envvar="CONVLENS_TOKEN",
            help="Secret that requests send as `Authorization: Bearer TOKEN`.",
        ),
    ] = None,
    top: Annotated[
        int, typer.Option("--top", "-k", min=1, metavar="K", help="Number of classes to return.")
    ] = 1,
    min_accuracy: MinAccuracyOption = None,
    confidence: ConfidenceOption = "95%",
    prediction_set: PredictionSetOption = None,
    max_pixels: MaxPixelsOption = None,
    device: DeviceOption = None,
    trust_code: TrustCode = False,
) -> None:
    """Answer HTTP requests for predictions: POST an image to /predict.

    Prints its address when it is ready. Ctrl-C or SIGTERM ends it after the requests in flight.

    Examples:
        convlens serve digits
        curl --data-binary @seven.png http://127.0.0.1:8000/predict
        curl -F images=@a.png -F images=@b.png http://127.0.0.1:8000/predict
        convlens serve models/digits/model.onnx --port 9000 --top 3
    """
    from convlens import explore

    explore.check_installed("serve")
    from convlens.explore import serve as service

    service.serve(
        run,
        port=port,
        host=host,
        allow_remote=allow_remote,
        token=token,
        top_k=top,
        min_accuracy=parse_share_option("--min-accuracy", min_accuracy),
        confidence=parse_share_option("--confidence", confidence) or 0.95,
        prediction_set=parse_share_option("--prediction-set", prediction_set),
        max_pixels=max_pixels,
        device=device,
    )
