# Sourced by demo.sh and test.sh: a virtual environment with this package in it, made once, the package always fresh.

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
fail() { printf '\nError: %s\n' "$*" >&2; exit 1; }

# The first Python from 3.10 that can make a virtual environment; PYTHON=/path/to/python goes first.
find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.10 or later that has the modules venv and ensurepip was found (on Debian and Ubuntu: apt install" \
        "python3-venv); install one, or name it: PYTHON=/path/to/python bash $0"
}

# install_into VENV REQUIREMENT: leaves the environment's commands first on PATH.
install_into() {
    local venv=$1 requirement=$2 python
    if [ -x "$venv/bin/pip" ]; then
        say "Using the virtual environment $venv again"
    else
        python=$(find_python)
        say "Making the virtual environment $venv with $python ($("$python" --version 2>&1))"
        "$python" -m venv "$venv"
    fi
    export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"
    unset PYTHONPATH PYTHONHOME
    say "Installing $requirement (the first time downloads PyTorch and nnU-Net: a few minutes)"
    rm -rf "$repo/build/lib" # what setuptools left of an earlier build would get into this one
    "$venv/bin/pip" install --quiet --disable-pip-version-check "$requirement"
}
