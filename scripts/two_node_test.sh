#!/usr/bin/env bash
# Two nodes on one machine: two network namespaces joined by a cable (a veth pair), a torchrun agent in each
# (rendezvous c10d on node a). Each scenario disturbs a training and checks how it ends:
#
#   kill        node b is killed (SIGKILL, --nnodes=1:2): node a continues alone, with the same global batch
#   stop        SIGTERM to the torchrun of node b alone: both nodes save and stop, and the resumed run has the same bits
#   partition   no packet passes for a minute: the run continues, or is started again, and ends with the same bits
#   cut         no packet passes any more: both nodes end with one message; the resumed run has the same bits
#
#   bash scripts/two_node_test.sh [SCENARIO...]               two network namespaces: root, and ip (Debian: iproute2)
#   bash scripts/two_node_test.sh --localhost [SCENARIO...]   two agents on 127.0.0.1, without partition and cut
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
if [ "${1:-}" = --localhost ]; then
    way=localhost
    shift
fi
scenarios=("$@")
[ $# -gt 0 ] || scenarios=(kill stop partition cut)
for scenario in "${scenarios[@]}"; do
    case "$scenario" in
        kill | stop | partition | cut) ;;
        *) echo "usage: bash scripts/two_node_test.sh [--localhost] [kill] [stop] [partition] [cut]" >&2; exit 2 ;;
    esac
done

work="$(mktemp -d "${TMPDIR:-/tmp}/two_node_test.XXXXXX")"
name="tn$$"
declare -A agents

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
    echo "two_node_test: ${scenario:-}: $*" >&2
    echo "logs: $output.a.log $output.b.log" >&2
    exit 1
}

declare -A address=([a]=127.0.0.1 [b]=127.0.0.1) other=([a]=b [b]=a)
interface=lo
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
    address=([a]=10.77.0.1 [b]=10.77.0.2)
    interface=cable
    for node in a b; do
        ip -n "$name-$node" addr add "${address[$node]}/24" dev cable
        ip -n "$name-$node" link set cable up
        ip -n "$name-$node" link set lo up
    done
fi

# Packets go to a network card that is not there, and are lost without an error on either side.
cut_cable() {
    for node in a b; do
        ip -n "$name-$node" neigh replace "${address[${other[$node]}]}" lladdr 02:00:00:00:00:01 nud permanent dev cable
    done
}

mend_cable() {
    for node in a b; do
        ip -n "$name-$node" neigh del "${address[${other[$node]}]}" dev cable
    done
}

# start_nodes OUTPUT NNODES MAX_RESTARTS [more options of train.py]
start_nodes() {
    output="$1"
    local nnodes="$2" restarts="$3" port inside
    shift 3
    port="$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
    for node in a b; do
        inside=()
        [ "$way" = localhost ] || inside=(ip netns exec "$name-$node")
        # Each node names its own address: a host name would lead out of the namespace.
        TWO_NODE_TEST="$name-$node" OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME="$interface" NCCL_SOCKET_IFNAME="$interface" \
            "${inside[@]}" "$PYTHON" -m torch.distributed.run --nnodes="$nnodes" --nproc_per_node=1 \
            --max-restarts="$restarts" --rdzv_backend=c10d --rdzv_endpoint="${address[a]}:$port" --rdzv_id="$name" \
            --rdzv_conf=is_host="$([ "$node" = a ] && echo true || echo false)",join_timeout=300,last_call_timeout=20,read_timeout=300 \
            --local_addr="${address[$node]}" \
            train.py --dataset shapes --data-path "$work/shapes" --model faster_rcnn_r18_fpn --weights none --device cpu \
            --model-set fpn_channels=16 --model-set roi_hidden_channels=32 --model-set roi_samples_per_image=32 \
            --min-size 96 --max-size 128 --workers 0 --max-epochs 2 --limit-train-batches 15 --limit-val-batches 2 \
            --global-batch-size 4 --batch-size 2 --checkpoint-iterations 2 --output-dir "$output" --resume auto "$@" \
            >> "$output.$node.log" 2>&1 &
        agents[$node]=$!
    done
}

iterations() { grep -c '"kind": "train"' "$output/metrics.jsonl" 2>/dev/null || true; }

await_iterations() {
    for _ in $(seq 3000); do
        [ "$(iterations)" -ge 6 ] 2>/dev/null && break
        kill -0 "${agents[a]}" 2>/dev/null || fail "node a ended before anything was trained"
        sleep 0.2
    done
    [ "$(iterations)" -ge 6 ] || fail "nothing was trained within 10 minutes"
    grep -q "2 processes x 2 images" "$output".?.log || fail "the two nodes did not train together"
}

# Wait up to 10 minutes for the agent of a node; its exit status is in $status.
await_end() {
    for _ in $(seq 3000); do
        kill -0 "${agents[$1]}" 2>/dev/null || break
        sleep 0.2
    done
    ! kill -0 "${agents[$1]}" 2>/dev/null || fail "node $1 hangs"
    status=0
    wait "${agents[$1]}" || status=$?
}

finish_both() {
    for node in a b; do
        await_end "$node"
        [ "$status" = 0 ] || fail "node $node ended with $status"
    done
}

# Start both again and compare the end with that of an undisturbed run.
resume_and_compare() {
    local saved
    saved="$(iterations)"
    start_nodes "$output" 2 0
    finish_both
    compare
    echo "resumed after iteration $saved: the same bits as an undisturbed run"
}

compare() {
    PYTHONPATH="$root/scripts:$root" "$PYTHON" - "$work/undisturbed" "$output" << 'END' || fail "it ended otherwise"
import sys
from pathlib import Path

from fault_injection.comparison import differences

found = differences(*map(Path, sys.argv[1:]))
print("\n".join(found[:5]), end="")
sys.exit(bool(found))
END
}

run_kill() {
    start_nodes "$work/kill" 1:2 3
    disown "${agents[b]}" # the shell is to say nothing of its end
    await_iterations
    # The node that hosts the rendezvous (a) is the one that stays.
    kill_node b
    echo "node b killed at iteration $(iterations)"
    await_end a
    [ "$status" = 0 ] || fail "node a did not finish"
    grep -hE "^(resumed|changed|batch) |processes: 2 before, now 1" "$output.a.log" | tail -4
    "$PYTHON" - "$output" << 'END' || fail "the records are not those of one whole training"
import json
import sys
from pathlib import Path

output = Path(sys.argv[1])
records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
assert [r["iteration"] for r in records if r["kind"] == "train"] == list(range(30))
assert [r["iteration"] for r in records if r["kind"] == "val"] == [14, 29]
starts = json.loads((output / "config.json").read_text())["starts"]
assert [start["world_size"] for start in starts] == [2, 1], starts
assert starts[1]["iteration"] > 0
print(f"node a continued alone from iteration {starts[1]['iteration']} to 30; every iteration recorded once")
END
}

run_stop() {
    start_nodes "$work/stop" 2 0
    await_iterations
    kill -TERM "${agents[b]}"
    for node in a b; do
        await_end "$node"
        [ "$status" = 1 ] || fail "node $node ended with $status"
    done
    grep -q "^stopped by .*exit status 75" "$output".?.log || fail "the run does not say that it has stopped and saved"
    grep -hE "^stopped by " "$output".?.log
    resume_and_compare
}

run_partition() {
    start_nodes "$work/partition" 2 3
    await_iterations
    cut_cable
    echo "cable cut at iteration $(iterations), for 60 seconds"
    sleep 60
    mend_cable
    local statuses=""
    for node in a b; do
        await_end "$node"
        statuses="$statuses$status"
    done
    if [ "$statuses" = 00 ]; then
        compare
        echo "the run continued: the same bits as an undisturbed run"
    else
        resume_and_compare
    fi
}

run_cut() {
    start_nodes "$work/cut" 2 0 --collective-timeout 0.5
    disown "${agents[a]}" "${agents[b]}"
    await_iterations
    cut_cable
    echo "cable cut at iteration $(iterations), for good"
    for node in a b; do
        for _ in $(seq 1500); do
            grep -q "^error: " "$output.$node.log" && break
            sleep 0.2
        done
        [ "$(grep -c "^error: " "$output.$node.log")" = 1 ] || fail "node $node does not end with one message"
        grep -hA1 "^error: " "$output.$node.log"
    done
    # torchrun itself may wait for its store for long.
    kill_node a
    kill_node b
    mend_cable
    resume_and_compare
}

"$PYTHON" scripts/make_shapes.py --data-path "$work/shapes" > /dev/null
for scenario in "${scenarios[@]}"; do
    if [ "$way" = localhost ] && [[ "$scenario" = partition || "$scenario" = cut ]]; then
        echo "two nodes ($way): $scenario: skipped, it needs namespaces"
        continue
    fi
    if [ "$scenario" != kill ] && [ ! -d "$work/undisturbed" ]; then
        echo "two nodes ($way): undisturbed"
        start_nodes "$work/undisturbed" 2 0
        finish_both
    fi
    echo "two nodes ($way): $scenario"
    "run_$scenario"
done
passed=yes
echo "two_node_test: passed ($way)"
