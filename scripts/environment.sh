# Sourced by quickstart.sh and test.sh: makes .venv in the checkout and installs the project and the given extras.
# Usage: source scripts/environment.sh EXTRA[,EXTRA...]    (afterwards .venv/bin is first on PATH)

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
environment_extras="$1"
# A mark per setup.cfg and choice of extras: a second run starts at once, and needs no network.
environment_mark=".venv/.installed-$(cat setup.cfg pyproject.toml | sha256sum | cut -c1-16)-${environment_extras//,/-}"
if [ ! -f "$environment_mark" ]; then
    echo "installing into $root/.venv (PyTorch with CUDA is about 5.5 GB; once)"
    python3 -m venv .venv
    .venv/bin/python -m pip install --quiet --upgrade pip
    .venv/bin/python -m pip install --quiet --editable ".[${environment_extras}]"
    touch "$environment_mark"
fi
export PATH="$root/.venv/bin:$PATH"
