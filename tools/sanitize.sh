#!/usr/bin/env bash
# Unit tests of the compiled code with AddressSanitizer and UBSan in it, built in a copy; MINUTES=6
# adds as many of chaos. Needs gcc. Memory that grows there is the sanitizer's, which keeps what is freed.
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python=$PWD/.venv/bin/python
git clone -q . "$scratch/copy"
cd "$scratch/copy"
sanitizers=-fsanitize=address,undefined
CFLAGS="-g -fno-omit-frame-pointer $sanitizers -fsanitize-recover=address" LDFLAGS=$sanitizers \
  "$python" setup.py -q build_ext --inplace
library() { gcc -print-file-name="$1"; }
# Of UCX's ways of copying, cma asks for what the sanitizer takes for a wild address.
export PYTHONPATH=$PWD UCX_TLS=^cma
export LD_PRELOAD="$(library libasan.so) $(library libubsan.so) $(library libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=0:use_sigaltstack=0:detect_odr_violation=0:log_path=$scratch/found
export UBSAN_OPTIONS=print_stacktrace=1:log_path=$scratch/found
"$python" -m pytest -q -p no:cacheprovider tests/unit/test_{asking,attention,company,decode_facts}.py \
  tests/unit/test_{device_turn,dispatch,native,sampler,waiting,weights}.py || failed=1
[ -z "${MINUTES:-}" ] || "$python" -m tests.chaos --minutes "$MINUTES" || true
unset LD_PRELOAD
if compgen -G "$scratch/found*" >/dev/null; then
  cat "$scratch"/found*
  failed=1
fi
[ -z "${failed:-}" ] || exit 1
echo 'the sanitizers found nothing'
