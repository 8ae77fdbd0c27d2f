#!/usr/bin/env bash
# The paper's comparison with the tiny VLA: eight methods on each task, from one SFT checkpoint of the task, at equal env-step budgets.
#   SEEDS="1 2 3" STEPS=9600 METHODS="STA-TPO IPI" benchmark/paper_table.sh [ENV_ID ...]     # then: python benchmark/paper_table.py runs/*__paper
# Another budget has a name and a table of its own. It has an imitation of its own (SFT_FLAGS are sft.py's; shipped for long, quick and rough on StackCube-v1, turned on
# SimplerEnv's), with the preference steps from it, or with IMITATION=NAME another budget's, IMITATION=paper that of the budget without a name:
#   NAME=long STEPS=38400 DEMOS=1000 UPDATES=2500 PPO_FLAGS="--anneal-lr --gae-lambda 0.5" METHODS="STA-TPO IPI PPO" benchmark/paper_table.sh StackCube-v1
#   NAME=lambda-1 IMITATION=paper PPO_FLAGS="--no-anneal-lr --gae-lambda 1" METHODS=PPO benchmark/paper_table.sh StackCube-v1
# but preference steps from more than 16 initial states (STATES) are a budget's own:
#   NAME=wide IMITATION=paper STATES=64 STEPS=36000 PPO_FLAGS="--learning-rate 1.5e-5" METHODS="STA-TPO-sum IPI-sum PPO" benchmark/paper_table.sh StackCube-v1
# A machine with a GPU and many cores takes chains side by side, once the first line is done:
#   METHODS= benchmark/paper_table.sh StackCube-v1
#   for SEED in 1 2 3; do for METHODS in "STA-TPO TPO SFT-TPO-PPO IPI" PPO PPO-dense STA-PPO; do export METHODS; SEEDS=$SEED benchmark/paper_table.sh StackCube-v1 & done; done; wait
# Resumable: what has a results.json is left as it is, what was stopped goes on. The roll-outs that TPO and STA-TPO sample (8 a state, the same ones) are
# part of the budget of SFT-TPO-PPO and IPI: their PPO has what is left of STEPS. METHODS also knows STA-TPO-completed and
# STA-TPO-sum, other costs in the pairs, TPO-sum, that without stages, STA-TPO-sum-q, with sums as q too, STA-TPO-sum5, with five passes over the pairs,
# IPI-sum and IPI-sum5 from STA-TPO-sum and STA-TPO-sum5, and STA-PPO-no-reach (-no-grasp, ...), a stage that pays only when it ends.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY=PASSIVE
PYTHON=${PYTHON:-.venv/bin/python}
STEPS=${STEPS:-9600} NAME=${NAME:-paper} IMITATION=${IMITATION:-${NAME:-paper}} DEMOS=${DEMOS:-400} UPDATES=${UPDATES:-1500} STATES=${STATES:-16} PPO_FLAGS=${PPO_FLAGS:---no-anneal-lr}
EPISODES=(--num-eval-episodes "${EPISODES:-200}" --num-envs 6) # SimplerEnv's grids are played once: 24 or 64

# NAME, of imitation and of preference steps from 16 states IMITATION
budget() { case "$1 $STATES" in SFT\ * | TPO*\ 16 | STA-TPO*\ 16) echo "$IMITATION" ;; *) echo "$NAME" ;; esac; }
of() { echo "runs/${ENV_ID}__${1,,}__${SEED}__$(budget "$1")"; }
method() { case $(budget "$1") in paper) echo "$1" ;; *) echo "$1@$(budget "$1")" ;; esac; }
run() { echo "$(date -u +%H:%M:%S) $*"; "$PYTHON" "$@"; }
# train METHOD SCRIPT CHECKPOINT ARGS...: a run and its evaluation
train() {
  RUN=$(of "$1")
  [ -f "$RUN/results.json" ] && return
  run "$2" --env-id "$ENV_ID" --seed "$SEED" --checkpoint "$3" --output-dir "$RUN" --resume --num-eval-episodes 0 "${@:4}"
  run eval.py --checkpoint "$RUN" --method "$(method "$1")" "${EPISODES[@]}"
}
# tpo METHOD ARGS...: the first one samples the roll-outs, the others train on the same
tpo() {
  mkdir -p "$(of "$1")"
  for OTHER in STA-TPO STA-TPO-sum; do
    [ -d "$(of "$1")/rollouts" ] || [ ! -d "$(of $OTHER)/rollouts" ] || cp -r "$(of $OTHER)/rollouts" "$(of $OTHER)/source.txt" "$(of "$1")/"
  done
  train "$1" sta_tpo.py "$SFT" --num-initial-states "$STATES" "${@:2}"
}
ppo() { train "$1" sta_ppo.py "$2" --total-timesteps "$3" $PPO_FLAGS "${@:4}"; }
left() { "$PYTHON" -c "import json; print($STEPS - json.load(open('$(of "$1")/checkpoint/args.json'))['env_steps'])"; }

for ENV_ID in ${*:-StackCube-v1 LiftPegUpright-v1 PutCarrotOnPlateInScene-v1 PickCube-v1 PushCube-v1 PullCube-v1 PlaceSphere-v1 PegInsertionSide-v1
  PutSpoonOnTableClothInScene-v1 StackGreenCubeOnYellowCubeBakedTexInScene-v1 PutEggplantInBasketScene-v1}; do
  # one imitation for all seeds, the shipped one where there is one: what is compared comes after it
  SEED=1 DIR=$(SEED=1 of SFT) SFT=checkpoints/${ENV_ID}__sft$([ "$IMITATION" = paper ] || echo "__$IMITATION")
  if [ ! -d "$SFT" ]; then
    SFT=$DIR
    [ -f "$DIR/results.json" ] || run sft.py --env-id "$ENV_ID" --output-dir "$DIR" --resume --num-demos "$DEMOS" --num-updates "$UPDATES" --num-eval-episodes 0 ${SFT_FLAGS:-}
  fi
  [ -f "$DIR/results.json" ] || run eval.py --checkpoint "$SFT" --output-dir "$DIR" --method "$(method SFT)" "${EPISODES[@]}"
  for SEED in ${SEEDS:-1 2 3}; do
    for METHOD in ${METHODS-STA-TPO TPO STA-PPO PPO PPO-dense SFT-TPO-PPO IPI}; do
      case $METHOD in
        STA-TPO) tpo STA-TPO ;;
        TPO) tpo TPO --no-stage-aware --max-pairs-per-stage 24 ;;
        TPO-sum) tpo TPO-sum --no-stage-aware --max-pairs-per-stage 24 --cost-sum --cost-coef 0.01 ;;
        STA-TPO-completed) tpo STA-TPO-completed --cost-margin 1e9 ;;
        STA-TPO-sum) tpo STA-TPO-sum --cost-sum --cost-coef 0.01 ;; # a sum is some ten times a mean
        STA-TPO-sum-q) tpo STA-TPO-sum-q --cost-sum --cost-coef 0.01 --tpo-reduction sum --beta 0.3 ;; # a segment has some ten steps
        STA-TPO-sum5) tpo STA-TPO-sum5 --cost-sum --cost-coef 0.01 --num-epochs 5 ;;
        STA-PPO) ppo STA-PPO "$SFT" "$STEPS" ;;
        STA-PPO-no-*) ppo "$METHOD" "$SFT" "$STEPS" --silent-stages "${METHOD#STA-PPO-no-}" ;;
        PPO) ppo PPO "$SFT" "$STEPS" --reward sparse ;;
        PPO-dense) [[ $ENV_ID == *Scene-v1 ]] || ppo PPO-dense "$SFT" "$STEPS" --reward dense ;; # ManiSkill has none for SimplerEnv's tasks
        SFT-TPO-PPO) ppo SFT-TPO-PPO "$(of TPO)" "$(left TPO)" --reward sparse ;;
        IPI | IPI-sum | IPI-sum5) ppo "$METHOD" "$(of "STA-TPO${METHOD#IPI}")" "$(left "STA-TPO${METHOD#IPI}")" ;;
        *) echo "unknown method $METHOD" >&2; exit 2 ;;
      esac
    done
  done
done
