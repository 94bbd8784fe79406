#!/usr/bin/env bash
# Check style and types of the source: ruff and mypy, as in continuous integration and before a commit.
#
#   bash scripts/lint.sh
#
# It needs an environment with the extra `test`: pip install ".[test]".
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repo"

ruff check .
ruff format --check .

# In the repository, trainers and planners lie beside the package. An installation puts them inside, and so do these links.
as_installed=$(mktemp -d)
trap 'rm -rf "$as_installed"' EXIT
mkdir "$as_installed/pcrl_nnunet"
ln -s "$repo"/pcrl_nnunet/* "$repo/trainers" "$repo/planners" "$as_installed/pcrl_nnunet/"
checked=(mypy --config-file "$repo/pyproject.toml" --cache-dir "$repo/.mypy_cache")
(cd "$as_installed" && "${checked[@]}" -p pcrl_nnunet && "${checked[@]}" "$repo/scripts")
