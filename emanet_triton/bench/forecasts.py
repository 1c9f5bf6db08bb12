"""Forecasts for an H100 or H200, made before the kernels concerned ran on a GPU.

Those of EM attention, of labels, of ``gluon``, of pairs of 1x1 convolutions and of an image from
the host are for what changed after commit 436bc76 (docs/h200.md says how they were made); the
others are from a review of commit 54dbbc2.
"""

# (suite, provider) → beginning of a case's name → milliseconds of one call.
FORECASTS: dict[tuple[str, str], dict[str, str]] = {
    ("em", "triton"): {
        "block B=1 N=32768 bf16": "0.15-0.17",
        "block B=8 N=32768 bf16": "1-1.05",
        "block B=1 N=32768 fp32": "0.5-0.9",
    },
    ("em", "one-pass-128"): {"block B=1 N=32768 bf16": "0.1-0.125"},
    ("em", "one-pass-16"): {"block B=8 N=32768 bf16": "0.49-0.575"},
    ("conv", "gluon"): {
        "1x1 C=512 O=2048 H=128 W=256 stride=1 dilation=1 residual relu B=1 bf16": "0.105-0.125",
        "1x1 C=512 O=2048 H=97 W=97 stride=1 dilation=1 residual relu B=8 bf16": "0.235-0.27",
        "1x1 C=1024 O=2048 H=128 W=256 stride=1 dilation=1 B=1 bf16": "0.18-0.2",
        "1x1 C=1024 O=2048 H=97 W=97 stride=1 dilation=1 B=8 bf16": "0.41-0.45",
        "3x3 C=512 O=512 H=128 W=256 stride=1 dilation=4 relu B=1 bf16": "0.2-0.21",
        "3x3 C=512 O=512 H=97 W=97 stride=1 dilation=4 relu B=8 bf16": "0.5-0.53",
    },
    ("conv", "triton"): {
        "3x3 C=512 O=512 H=128 W=256 stride=1 dilation=2 relu B=1 bf16": "0.31-0.33",
        "3x3 C=512 O=512 H=128 W=256 stride=1 dilation=4 relu B=1 bf16": "0.31-0.33",
        "3x3 C=256 O=256 H=128 W=256 stride=1 dilation=1 relu B=1 bf16": "0.075-0.085",
        "3x3 C=256 O=256 H=128 W=256 stride=1 dilation=2 relu B=1 bf16": "0.075-0.085",
        "1x1 C=256 O=1024 H=128 W=256 stride=1 dilation=1 residual relu B=1 bf16": "0.065-0.075",
        "3x3 C=3 O=32 H=1024 W=2048 stride=2 dilation=1 relu B=1 bf16": "0.07-0.09",
        "expand-reduce P=64 O=256 R=64 H=256 W=512 B=1 bf16": "0.055-0.065",
        "expand-reduce P=64 O=256 R=128 H=256 W=512 B=1 bf16": "0.06-0.075",
        "expand-reduce P=128 O=512 R=128 H=128 W=256 B=1 bf16": "0.028-0.034",
        "expand-reduce P=128 O=512 R=256 H=128 W=256 B=1 bf16": "0.035-0.045",
        "expand-reduce P=256 O=1024 R=256 H=128 W=256 B=1 bf16": "0.06-0.075",
    },
    ("post", "triton"): {
        "whole 1024x2048 bf16": "0.016-0.02",
        "slide 1024x2048 bf16": "0.03-0.04",
        "whole ms+flip 1024x2048 bf16": "0.45-0.65",
    },
    ("model", "fused-bf16"): {
        "r50 whole 1024x2048 from=device": "6-6.6",
        "r50 whole 1024x2048 from=host": "5.1-6.1",
        "r101 whole 1024x2048 from=device": "9.2-9.8",
        "r50 slide 1024x2048 from=device": "13-14.5",
        "r101 slide 1024x2048 from=device": "20-22",
    },
}


def forecast(suite: str, case: str, provider: str) -> str:
    """A range of milliseconds such as "6-6.6"; empty if there is no forecast.

    None is for logits that spread over hundreds.
    """
    known = {} if case.endswith(" spread") else FORECASTS.get((suite, provider), {})
    return next((ms for name, ms in known.items() if f"{case} ".startswith(f"{name} ")), "")
