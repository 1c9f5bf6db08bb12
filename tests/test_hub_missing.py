"""Without huggingface_hub the package works, and ``emanet_triton.hub`` says what is missing."""

import subprocess
import sys


def test_without_huggingface_hub():
    code = (
        "import sys; sys.modules['huggingface_hub'] = None;"
        "import emanet_triton; print(emanet_triton.list_models());"
        "import emanet_triton.hub"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "emanet_demo" in done.stdout
    assert done.stderr.splitlines()[-1] == (
        "ImportError: emanet_triton.hub needs the package huggingface_hub: pip install '.[hub]'"
    )
