#!/bin/sh
# Makes the virtual environment $1 with hjepa-mlx in it, editable, and the extra $2 (may be empty).
# On Linux MLX computes on an NVIDIA GPU where nvidia-smi finds one of compute capability 7.5 with driver 580, or newer.
# On Debian and Ubuntu also installs OpenBLAS and g++ when it may; without them MLX runs, slowly.
set -eu
venv=$1
extra=${2:-}
cd "$(dirname "$0")/.."

apt_install() { # as root, or with passwordless sudo; says what to do otherwise
    if [ "$(id -u)" = 0 ]; then sudo=""
    elif sudo -n true 2>/dev/null; then sudo="sudo"
    else
        echo "Wanted: sudo apt-get install $*. Going on without." >&2
        return 0
    fi
    if ! { $sudo apt-get update -qq &&
        $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@"; } >/dev/null; then
        echo "apt-get could not install $*. Going on without." >&2
    fi
}

if [ "$(uname)" = Linux ] && command -v apt-get >/dev/null; then
    wanted=""
    PATH="$PATH:/usr/sbin:/sbin" ldconfig -p | grep -q 'libopenblas\.so\.0' || wanted="libopenblas0-pthread"
    command -v g++ >/dev/null || wanted="$wanted g++"
    [ -z "$wanted" ] || apt_install $wanted
fi

case "$(uname -sm)" in
    "Linux x86_64" | "Darwin arm64") ;;
    "Darwin x86_64") echo "This shell runs under Rosetta, or on an Intel Mac; hjepa-mlx needs Apple silicon's own: arch -arm64 zsh" >&2; exit 1 ;;
    *) echo "hjepa-mlx runs on Apple silicon and on Linux x86-64; this is $(uname -sm)." >&2; exit 1 ;;
esac

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=""
    # an Intel Python runs on Apple silicon too, but there is no MLX for it
    right='import platform, sys; version = (3, 10) <= sys.version_info < (3, 14)
sys.exit(not version or platform.system() == "Darwin" and platform.machine() != "arm64")'
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3.10 python3}; do
        if "$candidate" -c "$right" 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "hjepa-mlx needs Python 3.10 to 3.13 (mlx-data has no wheels for newer ones), on a Mac for arm64." >&2
        echo "Install one (macOS: brew install python@3.13), or name it: PYTHON=/path make demo" >&2
        exit 1
    fi
    venv_package="$(basename "$(readlink -f "$(command -v "$python")")")-venv"
    if ! "$python" -c 'import ensurepip' 2>/dev/null && command -v apt-get >/dev/null; then
        apt_install "$venv_package"
    fi
    if ! "$python" -m venv --clear "$venv"; then
        rm -rf "$venv"
        echo "$python cannot make a virtual environment. Debian: sudo apt-get install $venv_package" >&2
        exit 1
    fi
fi

if [ "$(uname)" = Linux ]; then
    # e.g. "580.65.06, 9.0": the driver, and the card's compute capability
    card="$(timeout 20 nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>/dev/null | head -n 1)"
    capability="$(echo "${card##*, }" | tr -d .)"
    if [ "${card%%.*}" -ge 580 ] && [ "$capability" -ge 75 ]; then backend=cuda; else backend=cpu; fi 2>/dev/null
    extra="${extra:+$extra,}$backend"
fi
wish=".${extra:+[$extra]}"
stamp="$venv/.hjepa-$extra"
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    echo "Installing hjepa-mlx${extra:+ with $extra} into $venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$wish"
    touch "$stamp"
fi

# In folders that macOS indexes or syncs it hides what is in .venv, and Python skips hidden .pth files
[ "$(uname)" != Darwin ] || chflags -R nohidden "$venv"
