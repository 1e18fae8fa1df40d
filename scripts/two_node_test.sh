#!/usr/bin/env bash
# Two nodes on one machine: two network namespaces joined by a cable (a veth pair), a torchrun agent in each
# (--nnodes=1:2, rendezvous c10d). One node is killed with SIGKILL; the job must go on alone, from the last checkpoint,
# with the same global batch, to the end. Needs root and ip (Debian: iproute2).
#
#   bash scripts/two_node_test.sh               two network namespaces
#   bash scripts/two_node_test.sh --localhost   two agents on 127.0.0.1, where namespaces are not permitted
#
# PYTHON=... chooses the interpreter (.venv/bin/python, or python3). The log of each node stays where a failure says.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
cd "$root"
if [ -z "${PYTHON:-}" ]; then
    PYTHON="$root/.venv/bin/python"
    [ -x "$PYTHON" ] || PYTHON=python3
fi

way=namespaces
case "${1:-}" in
    "") ;;
    --localhost) way=localhost ;;
    *) echo "usage: bash scripts/two_node_test.sh [--localhost]" >&2; exit 2 ;;
esac

work="$(mktemp -d "${TMPDIR:-/tmp}/two_node_test.XXXXXX")"
name="tn$$"
agents=()

# Everything that belongs to a node of this test carries its name in the environment.
kill_node() {
    local pids
    while pids="$(grep -lsxz "TWO_NODE_TEST=$name-$1" /proc/[0-9]*/environ | grep -o '[0-9]*' || true)" && [ -n "$pids" ]; do
        # shellcheck disable=SC2086
        kill -9 $pids 2>/dev/null || true
        sleep 0.1
    done
}

clean_up() {
    kill_node a
    kill_node b
    if [ "$way" = namespaces ]; then
        ip netns del "$name-a" 2>/dev/null || true
        ip netns del "$name-b" 2>/dev/null || true
    fi
    if [ "${passed:-}" = yes ]; then rm -rf "$work"; fi
}
trap clean_up EXIT

fail() {
    echo "two_node_test: $*" >&2
    echo "logs: $work/a.log $work/b.log" >&2
    exit 1
}

if [ "$way" = namespaces ]; then
    hint="run it as root on a machine where network namespaces may be made, or: bash scripts/two_node_test.sh --localhost"
    if ! command -v ip > /dev/null; then
        echo "two_node_test: there is no ip here (Debian and Ubuntu: apt-get install iproute2)" >&2
        exit 3
    fi
    if ! ip netns add "$name-a" 2> "$work/ip.txt" || ! ip netns add "$name-b" 2>> "$work/ip.txt" ||
        ! ip link add cable netns "$name-a" type veth peer name cable netns "$name-b" 2>> "$work/ip.txt"; then
        echo "two_node_test: no network namespaces here ($(head -1 "$work/ip.txt")); $hint" >&2
        exit 3
    fi
    for node in a b; do
        ip -n "$name-$node" addr add "10.77.0.$([ $node = a ] && echo 1 || echo 2)/24" dev cable
        ip -n "$name-$node" link set cable up
        ip -n "$name-$node" link set lo up
    done
    address=10.77.0.1
    interface=cable
else
    address=127.0.0.1
    interface=lo
fi

port="$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
output="$work/run"

start_node() {
    local inside=()
    [ "$way" = namespaces ] && inside=(ip netns exec "$name-$1")
    # Each node names its own address: a host name would lead out of the namespace.
    local own="$address"
    [ "$way" = namespaces ] && [ "$1" = b ] && own=10.77.0.2
    TWO_NODE_TEST="$name-$1" OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME="$interface" NCCL_SOCKET_IFNAME="$interface" \
        "${inside[@]}" "$PYTHON" -m torch.distributed.run --nnodes=1:2 --nproc_per_node=1 --max-restarts=3 \
        --rdzv_backend=c10d --rdzv_endpoint="$address:$port" --rdzv_id="$name" --local_addr="$own" \
        --rdzv_conf=is_host="$([ "$1" = a ] && echo true || echo false)",join_timeout=300,last_call_timeout=20 \
        train.py --dataset shapes --data-path "$work/shapes" --model faster_rcnn_r18_fpn --weights none --device cpu \
        --model-set fpn_channels=16 --model-set roi_hidden_channels=32 --model-set roi_samples_per_image=32 \
        --min-size 96 --max-size 128 --workers 0 --max-epochs 2 --limit-train-batches 30 --limit-val-batches 2 \
        --global-batch-size 4 --batch-size 2 --checkpoint-iterations 2 --output-dir "$output" --resume auto \
        > "$work/$1.log" 2>&1 &
    agents+=($!)
}

iterations() { grep -c '"kind": "train"' "$output/metrics.jsonl" 2>/dev/null || true; }

"$PYTHON" scripts/make_shapes.py --data-path "$work/shapes" > /dev/null
start_node a
start_node b
disown "${agents[1]}" # the shell is to say nothing of its end
echo "two nodes ($way): training"
for _ in $(seq 3000); do
    [ "$(iterations)" -ge 8 ] 2>/dev/null && break
    kill -0 "${agents[0]}" 2>/dev/null || fail "node a ended before anything was trained"
    sleep 0.2
done
[ "$(iterations)" -ge 8 ] || fail "nothing was trained within 10 minutes"
grep -q "2 processes x 2 images" "$work/a.log" "$work/b.log" || fail "the two nodes did not train together"

# The node that hosts the rendezvous (a) is the one that stays.
kill_node b
echo "node b killed at iteration $(iterations)"
if ! wait "${agents[0]}"; then fail "node a did not finish"; fi

grep -hE "^(resumed|changed|batch) |processes: 2 before, now 1" "$work/a.log" | tail -4
"$PYTHON" - "$output" << 'END' || fail "the records are not those of one whole training"
import json
import sys
from pathlib import Path

output = Path(sys.argv[1])
records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
assert [r["iteration"] for r in records if r["kind"] == "train"] == list(range(60))
assert [r["iteration"] for r in records if r["kind"] == "val"] == [29, 59]
starts = json.loads((output / "config.json").read_text())["starts"]
assert [start["world_size"] for start in starts] == [2, 1], starts
assert starts[1]["iteration"] > 0
print(f"node a went on alone from iteration {starts[1]['iteration']} to 60; every iteration recorded once")
END
passed=yes
echo "two_node_test: passed ($way)"
