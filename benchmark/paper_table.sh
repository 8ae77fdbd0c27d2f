#!/usr/bin/env bash
# The comparison of README.md and docs/: methods on each task, from one imitation, at equal env
# steps. Afterwards: python benchmark/paper_table.py runs/*__paper
#
#   METHODS="STA-TPO-sum PPO STA-PPO IPI-sum" benchmark/paper_table.sh [ENV_ID ...]
#
# runs the columns of README's table. Without METHODS it runs those of the paper's table, with the
# paper's mean cost. About three hours a task on two CPU cores. Resumable: a run with a results.json
# is left as it is, and a stopped run goes on.
#
# Settings are a budget. Every budget but the default has a NAME, which its runs end in.
#   STEPS      env steps of PPO; TPO's roll-outs count in SFT-TPO-PPO and IPI
#   STATES     initial states of the preference step, 8 roll-outs from each
#   IMITATION  the budget whose imitation this one begins with: NAME by default, paper: the default
#              budget's. The preference steps of that budget are shared if STATES is 16
#   DEMOS, UPDATES, SFT_FLAGS    sft.py's settings, of a budget with an imitation of its own
#   SEEDS, EPISODES, PPO_FLAGS   training seeds, evaluation episodes, sta_ppo.py's flags
# The head of docs/tables.md has the settings of every budget there. Examples:
#
#   NAME=long DEMOS=1000 UPDATES=2500 METHODS= benchmark/paper_table.sh StackCube-v1
#   NAME=broad IMITATION=long STATES=64 STEPS=36000 PPO_FLAGS="--learning-rate 1.5e-5" \
#     METHODS="STA-TPO-sum PPO IPI-sum" benchmark/paper_table.sh StackCube-v1
#
# The first line, with no METHODS, makes only the imitation. PickCube-v1's rows without a budget
# began with DEMOS=1000 UPDATES=2500.
#
# A machine with a GPU and many cores runs several chains at once, after the first line:
#   METHODS= benchmark/paper_table.sh StackCube-v1
#   for SEED in 1 2 3; do for METHODS in "STA-TPO-sum IPI-sum" PPO STA-PPO; do
#     export METHODS; SEEDS=$SEED benchmark/paper_table.sh StackCube-v1 & done; done; wait
#
# METHODS: STA-TPO and TPO (without stages) have the paper's mean cost, STA-TPO-sum and TPO-sum the
# summed one. STA-TPO-completed: pairs by completion alone. STA-TPO-sum-q: q is a sum too.
# STA-TPO-sum5: five passes over the pairs. IPI, IPI-sum, IPI-sum5: STA-PPO after that STA-TPO.
# STA-PPO-no-reach (-no-grasp, ...): the stage pays only when it ends.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY=PASSIVE
PYTHON=${PYTHON:-.venv/bin/python}
NAME=${NAME:-paper}
IMITATION=${IMITATION:-$NAME}
STEPS=${STEPS:-9600}
STATES=${STATES:-16}
DEMOS=${DEMOS:-400}
UPDATES=${UPDATES:-1500}
PPO_FLAGS=${PPO_FLAGS:---no-anneal-lr}
# SimplerEnv's grids are played once: 24 or 64 episodes.
EPISODES=(--num-eval-episodes "${EPISODES:-200}" --num-envs 6)

# budget METHOD: the budget that a run belongs to, its own or that of its imitation
budget() {
  case "$1 $STATES" in
    SFT\ * | TPO*\ 16 | STA-TPO*\ 16) echo "$IMITATION" ;;
    *) echo "$NAME" ;;
  esac
}
# of METHOD: its run's folder
of() { echo "runs/${ENV_ID}__${1,,}__${SEED}__$(budget "$1")"; }
# method METHOD: its name in the row
method() {
  case $(budget "$1") in
    paper) echo "$1" ;;
    *) echo "$1@$(budget "$1")" ;;
  esac
}
run() {
  echo "$(date -u +%H:%M:%S) $*"
  "$PYTHON" "$@"
}
# train METHOD SCRIPT CHECKPOINT ARGS...: a run and its evaluation
train() {
  RUN=$(of "$1")
  [ -f "$RUN/results.json" ] && return
  run "$2" --env-id "$ENV_ID" --seed "$SEED" --checkpoint "$3" --output-dir "$RUN" --resume \
    --num-eval-episodes 0 "${@:4}"
  run eval.py --checkpoint "$RUN" --method "$(method "$1")" "${EPISODES[@]}"
}
# tpo METHOD ARGS...: the first one samples the roll-outs, the others train on the same roll-outs
tpo() {
  mkdir -p "$(of "$1")"
  for OTHER in STA-TPO STA-TPO-sum; do
    if [ ! -d "$(of "$1")/rollouts" ] && [ -d "$(of $OTHER)/rollouts" ]; then
      cp -r "$(of $OTHER)/rollouts" "$(of $OTHER)/source.txt" "$(of "$1")/"
    fi
  done
  train "$1" sta_tpo.py "$SFT" --num-initial-states "$STATES" "${@:2}"
}
# ppo METHOD CHECKPOINT STEPS ARGS...
ppo() { train "$1" sta_ppo.py "$2" --total-timesteps "$3" $PPO_FLAGS "${@:4}"; }
# left METHOD: the env steps that its roll-outs leave of STEPS
left() {
  local read="import json, sys; print($STEPS - json.load(open(sys.argv[1]))['env_steps'])"
  "$PYTHON" -c "$read" "$(of "$1")/checkpoint/args.json"
}
# imitate: sets SFT to the one imitation that all seeds begin with, trains it if there is none
imitate() {
  SEED=1
  SFT=$(of SFT)
  [ -f "$SFT/results.json" ] && return
  case $IMITATION in
    "$NAME" | paper) ;;
    *)
      echo "$SFT is missing: first NAME=$IMITATION METHODS= $0 $ENV_ID, with its settings" >&2
      exit 2
      ;;
  esac
  run sft.py --env-id "$ENV_ID" --vla tiny --output-dir "$SFT" --resume --num-demos "$DEMOS" \
    --demo-speed 0.4 --demo-pause 0.04 --image-shift 0 --num-updates "$UPDATES" \
    --num-eval-episodes 0 ${SFT_FLAGS:-}
  run eval.py --checkpoint "$SFT" --method "$(method SFT)" "${EPISODES[@]}"
}

TASKS=(StackCube-v1 LiftPegUpright-v1 PutCarrotOnPlateInScene-v1 PickCube-v1 PushCube-v1
  PullCube-v1 PlaceSphere-v1 PegInsertionSide-v1 PutSpoonOnTableClothInScene-v1
  StackGreenCubeOnYellowCubeBakedTexInScene-v1 PutEggplantInBasketScene-v1)
WHOLE=(--no-stage-aware --max-pairs-per-stage 24)
for ENV_ID in ${*:-${TASKS[@]}}; do
  imitate
  for SEED in ${SEEDS:-1 2 3}; do
    for METHOD in ${METHODS-STA-TPO TPO STA-PPO PPO PPO-dense SFT-TPO-PPO IPI}; do
      case $METHOD in
        STA-TPO) tpo STA-TPO --cost mean ;;
        TPO) tpo TPO "${WHOLE[@]}" --cost mean ;;
        TPO-sum) tpo TPO-sum "${WHOLE[@]}" ;;
        STA-TPO-completed) tpo STA-TPO-completed --cost mean --cost-margin 1e9 ;;
        STA-TPO-sum) tpo STA-TPO-sum ;;
        # A sum over a segment is larger than its mean, so beta is smaller.
        STA-TPO-sum-q) tpo STA-TPO-sum-q --tpo-reduction sum --beta 0.3 ;;
        STA-TPO-sum5) tpo STA-TPO-sum5 --num-epochs 5 ;;
        STA-PPO) ppo STA-PPO "$SFT" "$STEPS" ;;
        STA-PPO-no-*) ppo "$METHOD" "$SFT" "$STEPS" --silent-stages "${METHOD#STA-PPO-no-}" ;;
        PPO) ppo PPO "$SFT" "$STEPS" --reward sparse ;;
        # ManiSkill has no dense reward for SimplerEnv's tasks.
        PPO-dense) [[ $ENV_ID == *Scene-v1 ]] || ppo PPO-dense "$SFT" "$STEPS" --reward dense ;;
        SFT-TPO-PPO) ppo SFT-TPO-PPO "$(of TPO)" "$(left TPO)" --reward sparse ;;
        IPI | IPI-sum | IPI-sum5)
          BEFORE=STA-TPO${METHOD#IPI}
          ppo "$METHOD" "$(of "$BEFORE")" "$(left "$BEFORE")"
          ;;
        *)
          echo "unknown method $METHOD" >&2
          exit 2
          ;;
      esac
    done
  done
done
