#!/usr/bin/env bash
# Shows `benchmark.py run --slurm` on a real Slurm: a node that dies in the middle of a run, and a run that is pre-empted.
# Both go on from their last checkpoints, and end in the same weights as runs that nothing interrupts.
#
#     apt-get install slurm-wlm munge && pip install submitit      # Debian; not on a machine that belongs to a cluster
#     bash tests/slurm_demo.sh                                     # as root, from the repository's root, five minutes or more
#
# Everything it writes is in a temporary folder, its daemons are stopped at the end. CI does not run this.
set -euo pipefail
PYTHON=${PYTHON:-python}
WORK=$(mktemp -d)
export SLURM_CONF=$WORK/slurm.conf OMP_NUM_THREADS=1
say() { printf '\n=== %s\n' "$*"; }

# --- a Slurm of one node ---
PIDS=()
finish() {
    say "stopping the daemons; all files are in $WORK"
    scancel --user=root || true
    for _ in $(seq 20); do squeue -h | grep -q . && sleep 1 || break; done
    kill "${PIDS[@]}" 2>/dev/null || true
}
trap finish EXIT

cat >"$SLURM_CONF" <<CONF
ClusterName=rewind
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmUser=root
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation=$WORK/state
SlurmdSpoolDir=$WORK/spool
SlurmctldPidFile=$WORK/slurmctld.pid
SlurmdPidFile=$WORK/slurmd.pid
SlurmctldLogFile=$WORK/slurmctld.log
SlurmdLogFile=$WORK/slurmd.log
AuthType=auth/munge
AuthInfo=socket=$WORK/munge/munge.socket,cred_expire=10
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2
SlurmdTimeout=10
ReturnToService=2
KillWait=5
JobRequeue=1
NodeName=$(hostname) NodeAddr=127.0.0.1 CPUs=$(env -u OMP_NUM_THREADS nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
mkdir -p "$WORK/state" "$WORK/spool" "$WORK/munge"
chmod 755 "$WORK"
dd if=/dev/urandom of="$WORK/munge/key" bs=1024 count=1 status=none
chown -R munge:munge "$WORK/munge" && chmod 755 "$WORK/munge" && chmod 400 "$WORK/munge/key"
runuser -u munge -- munged --foreground --socket="$WORK/munge/munge.socket" --key-file="$WORK/munge/key" --log-file="$WORK/munge/log" \
    --pid-file="$WORK/munge/pid" --seed-file="$WORK/munge/seed" 2>/dev/null &
PIDS+=($!)
sleep 1
slurmctld -D >/dev/null 2>&1 &
PIDS+=($!)
start_node() {
    slurmd -D >/dev/null 2>&1 &
    NODE=$!
    PIDS+=("$NODE")
}
start_node
for _ in $(seq 60); do sinfo -h -o %T 2>/dev/null | grep -q idle && break || sleep 1; done
say "one node" && sinfo

# --- three of the smoke suite's runs, longer than there ---
RUN=("$PYTHON" benchmark.py run smoke --only cql__0)
LONGER=(-- --total-updates "${UPDATES:-2000}" --checkpoint-every 50 --eval-every 500)
NAMES=(hopper-medium-replay-v2__{cql,romi_cql,combo_cql}__0__bundled)
say "left alone, without Slurm"
"${RUN[@]}" --run-dir "$WORK/alone" "${LONGER[@]}" 2>/dev/null | tail -1

how_far() { # the update of the first run's last checkpoint
    "$PYTHON" -c "import torch; print(torch.load('$WORK/slurm/${NAMES[0]}/checkpoint.pt', weights_only=True)['step'])" 2>/dev/null || echo 0
}
progress() { # until it is some checkpoints further than now
    local before && before=$(how_far)
    until [ "$(how_far)" -ge $((before + 100)) ]; do sleep 0.5; done
    echo "${NAMES[0]}: checkpoint at update $(how_far)"
}

say "submitted to Slurm"
"${RUN[@]}" --slurm --run-dir "$WORK/slurm" "${LONGER[@]}"
progress
squeue

say "the node dies: slurmd and everything below it, with SIGKILL"
mapfile -t DEAD < <(scontrol listpids | awk 'NR > 1 && $1 > 0 {print $1}')
for pid in "${DEAD[@]}"; do # their parents, slurmstepd, and the processes they started
    parent=$(ps -o ppid= -p "$pid" | tr -d ' ')
    [ "$(ps -o comm= -p "$parent")" = slurmstepd ] && DEAD+=("$parent")
    mapfile -t -O "${#DEAD[@]}" DEAD < <(pgrep -P "$pid" || true)
done
kill -9 "$NODE" "${DEAD[@]}" 2>/dev/null || true
for _ in $(seq 60); do sinfo -h -o %T | grep -q down && break || sleep 1; done
sinfo
squeue

say "the node comes back"
start_node
progress
squeue

say "one is pre-empted: submitit's signal, on which it has the job requeued"
scancel --signal=USR2 "$(squeue -h -t R -o %i | grep _0)"
until [ -z "$(squeue -h)" ]; do sleep 1; done
cd "$WORK/slurm/benchmark_logs"
for name in "${NAMES[@]}"; do grep -aH "new run\|resumed\|normalized score" "$name.log" | sed "s|$WORK/slurm/||g"; done
grep -h "Caught\|Requeued\|completed successfully" slurm/*_log.err slurm/*_log.out
cd - >/dev/null

say "the same command again finds nothing to do"
"${RUN[@]}" --slurm --run-dir "$WORK/slurm" "${LONGER[@]}"

say "the same results as left alone?"
"$PYTHON" - "$WORK" "${NAMES[@]}" <<'PYTHON'
import json
import sys

import torch


def tensors(x, path=""):
    if isinstance(x, dict):
        return {k: v for key in x for k, v in tensors(x[key], f"{path}/{key}").items()}
    return {path: x} if isinstance(x, torch.Tensor) else {}


wrong = 0
for name in sys.argv[2:]:
    folders = [f"{sys.argv[1]}/{where}/{name}" for where in ("alone", "slurm")]
    scores = [json.load(open(f"{folder}/result.json"))["normalized_score"] for folder in folders]
    alone, slurm = (tensors(torch.load(f"{folder}/checkpoint.pt", weights_only=True)["agent"]) for folder in folders)
    differ = [k for k in alone if not torch.equal(alone[k], slurm[k])]
    print(f"{name}: scores {scores[0]} and {scores[1]}; {len(alone)} tensors of the agent, {len(differ)} differ")
    wrong += bool(differ) or scores[0] != scores[1]
sys.exit(bool(wrong))
PYTHON
