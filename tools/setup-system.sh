#!/bin/sh
# Make sure that what pip cannot install is there: Python >= 3.11 with venv, a C compiler, Python.h.
#
#   sh tools/setup-system.sh [command ...]     check; as root, install what is missing (Debian, Ubuntu)
#   sh tools/setup-system.sh --python          print the interpreter to use
#
# Further commands that must exist may be named: pkg-config, g++; hipcc, with what it needs; chromium, in which `make test` opens the HTML pages.
# For `make aarch64`: aarch64-linux-gnu-gcc, qemu-aarch64. PYTHON chooses an interpreter.
set -eu

find_python() {
    for name in ${PYTHON:-python3.11 python3 python3.12 python3.13 python3.14}; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
}

# Each line of `missing` is a package; each line of `why`, its reason.
missing=""
why=""
need() {
    missing="$missing $1"
    why="$why  $1: $2
"
}

have() {
    for name in "$@"; do
        if command -v "$name" >/dev/null; then return 0; fi
    done
    return 1
}

look() {
    missing="" why=""
    python=$(find_python)
    if [ -z "$python" ]; then
        need python3 "Python 3.11 or newer"
        need python3-venv "virtual environments"
        need python3-dev "Python.h, for the extension module"
    else
        "$python" -c 'import venv, ensurepip' 2>/dev/null || need python3-venv "virtual environments"
        header=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h
        [ -e "$header" ] || need python3-dev "Python.h, for the extension module"
    fi
    if [ -z "${CC:-}" ] && ! command -v cc >/dev/null && ! command -v gcc >/dev/null &&
        ! command -v clang >/dev/null; then
        need gcc "the C compiler"
        need libc6-dev "the C library's headers"
    elif [ -z "${CC:-}" ] && ! echo '#include <math.h>' | cc -E - >/dev/null 2>&1; then
        need libc6-dev "the C library's headers"
    fi
    for tool in "$@"; do
        case $tool in
        chromium) have chromium chromium-browser google-chrome || need chromium "a browser, to open pages in tests" ;;
        hipcc) have hipcc || { need hipcc "HIP's compiler for AMD GPUs" && need libamdhip64-dev "its runtime" &&
            need rocm-device-libs "its device libraries"; } ;;
        clang-19) have clang-19 || need clang-19 "the compiler for AMD GPUs that Debian's hipcc does not know" ;;
        aarch64-linux-gnu-gcc)
            have "$tool" || need gcc-aarch64-linux-gnu "the cross compiler for aarch64"
            # which only recommends it
            [ -e /usr/aarch64-linux-gnu/include/stdio.h ] || need libc6-dev-arm64-cross "the C library's headers for it" ;;
        qemu-aarch64) have "$tool" || need qemu-user "what runs programs of aarch64 here" ;;
        *) have "$tool" || need "$tool" "the command $tool" ;;
        esac
    done
}

if [ "${1:-}" = --python ]; then
    find_python
    exit
fi

look "$@"
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
    printf 'kimi_linear: missing on this machine (names as in Debian):\n%s' "$why" >&2
    echo "There is no apt-get here: install them with this system's package manager." >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    printf 'kimi_linear: missing on this machine:\n%s' "$why" >&2
    echo "One command mends it: sudo sh tools/setup-system.sh${*:+ $*}" >&2
    exit 1
fi

printf 'Installing with apt-get:\n%s' "$why"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086
apt-get install -y -qq --no-install-recommends $missing >/dev/null

look "$@"
if [ -n "$missing" ]; then
    printf 'kimi_linear: still missing after the installation:\n%s' "$why" >&2
    echo "A Python other than the system's needs its own headers; PYTHON=/usr/bin/python3 uses the system's." >&2
    exit 1
fi
