#!/bin/sh
# Makes the virtual environment $1 with hjepa-mlx in it, editable, and the extra $2 (may be empty).
# On Debian and Ubuntu also installs OpenBLAS and g++ when it may; without them MLX runs, slowly.
set -eu
venv=$1
extra=${2:-}
cd "$(dirname "$0")/.."

apt_install() { # as root, or with passwordless sudo; says what to do otherwise
    if [ "$(id -u)" = 0 ]; then sudo=""
    elif sudo -n true 2>/dev/null; then sudo="sudo"
    else
        echo "To go faster: sudo apt-get install $*. Going on without." >&2
        return 0
    fi
    if ! { $sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq "$@"; } >/dev/null; then
        echo "apt-get could not install $*. Going on without." >&2
    fi
}

if [ "$(uname)" = Linux ] && command -v apt-get >/dev/null; then
    wanted=""
    ldconfig -p 2>/dev/null | grep -q 'libopenblas\.so\.0' || wanted="libopenblas0-pthread"
    command -v g++ >/dev/null || wanted="$wanted g++"
    [ -z "$wanted" ] || apt_install $wanted
fi

if [ ! -x "$venv/bin/python" ]; then
    python=""
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3.10 python3}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "hjepa-mlx needs Python 3.10 to 3.13 (mlx-data has no wheels for newer ones)." >&2
        exit 1
    fi
    if ! "$python" -c 'import ensurepip' 2>/dev/null && command -v apt-get >/dev/null; then
        apt_install "$(basename "$(readlink -f "$(command -v "$python")")")-venv"
    fi
    "$python" -m venv "$venv"
fi

wish=".${extra:+[$extra]}"
stamp="$venv/.hjepa-$extra"
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    echo "Installing hjepa-mlx${extra:+ with its $extra tools} into $venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$wish"
    touch "$stamp"
fi
