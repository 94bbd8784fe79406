#!/usr/bin/env bash
# Run the checks on an installed copy of this package: ruff, mypy and the test suite.
#
#   bash scripts/test.sh [--long] [ARGUMENTS OF PYTEST]
#
# --long          also the tests that take minutes each: the commands of README.md and of the pages in docs, learning
# PCRL_VENV       the virtual environment (default: .venv-test in this repository; made if it is not there)
# PYTHON          the Python it is made with (default: the first from 3.10 on PATH)
# PCRL_TEST_DATA  a folder of raw nnU-Net datasets; the tests on real data are skipped without it
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$repo/scripts/venv.sh"

install_into "${PCRL_VENV:-$repo/.venv-test}" "$repo[test]"

# The tests make nnU-Net folders of their own: they must never see the user's.
unset nnUNet_raw nnUNet_preprocessed nnUNet_results nnUNet_extTrainer
export nnUNet_n_proc_DA=${nnUNet_n_proc_DA:-1} nnUNet_def_n_proc=${nnUNet_def_n_proc:-2} nnUNet_compile=f MPLBACKEND=Agg
# Threads that wait without spinning: where something else wants the two cores, too, a step is ten times faster.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

only=(-m "not long")
if [ "${1:-}" = --long ]; then only=() && shift; fi

cd "$repo"
say "ruff and mypy"
bash scripts/lint.sh
say "pytest, on the installed package${PCRL_TEST_DATA:+, with the real data in $PCRL_TEST_DATA}"
# Not `python -m pytest`: it would put this folder, where pcrl_nnunet has no trainers, before the installed package.
# Registered here: a test that did so itself would undo it under another one that runs beside it.
if ! pcrl_nnunet_register --check >/dev/null; then
    trap 'pcrl_nnunet_register --undo' EXIT
    pcrl_nnunet_register
fi
# Two at a time, a thread each; each begins with one half of them, in order, so that a module's fixtures are made once.
OMP_NUM_THREADS=1 pytest --durations=10 -n 2 --dist worksteal ${only[@]+"${only[@]}"} "$@"
say "All checks passed"
