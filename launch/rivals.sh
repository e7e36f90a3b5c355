#!/usr/bin/env bash
# Rivals of layer skipping, each trained on the same policy, demonstrations and number of steps, then all evaluated on the same
# episodes: nominal, and in perturbed worlds. The same command continues where it was stopped.
# Usage: launch/rivals.sh DEMONSTRATIONS [OUT] [path of the dysl command]
# Variables: POLICY, a MiniVLA; STEPS of training of each; SUITES, of evaluation; EPISODES of each task; WORKERS side by side (the
# figure needs 1, for latencies); LAYERS, how many run in the mean in the methods that choose; SKIPS, our settings; STATIC, depths
# of static rivals; SHALLOW_STEPS of the policy of SHALLOW layers that is trained from nothing, and SHALLOW_OPTIONS of its training.
set -eu
data=$1
out=${2:-runs/rivals}
dysl=${3:-dysl}
policy=${POLICY:-metaworld-mini}
steps=${STEPS:-1000}
suites=${SUITES:-metaworld-mt10 metaworld-mt10-plus}
episodes=${EPISODES:-20}
workers=${WORKERS:-1}
layers=${LAYERS:-6}
depth=${DEPTH:-24}
skips=${SKIPS:-1 0.9 0.7 0.5}
static=${STATIC:-2 3 4 6}
shallow=${SHALLOW:-3}
shallow_steps=${SHALLOW_STEPS:-10000}
shallow_options=${SHALLOW_OPTIONS:---crops corner2=96x96+28+44 --grids gripperPOV=2}

once() {
    step=$1
    shift
    [ -e "$out/$step.done" ] || { "$dysl" "$@" && touch "$out/$step.done"; }
}
evaluate() {
    name=$1
    shift
    for suite in $suites; do
        once "eval-$suite-$name" eval --suite "$suite" --episodes "$episodes" --workers "$workers" \
            --out "$out/eval/$suite/$name" "$@"
    done
}

mkdir -p "$out"
# Ours, and with it the full model and random exits.
once ours distill --policy "$policy" --data "$data" --fit-frames 6000 --adapter-steps 0 --skip-steps "$steps" --out "$out/ours"
evaluate ours --policy "$out/ours" --variants full,dysl,random
for skip in $skips; do
    evaluate "ours-$skip" --policy "$out/ours" --skip "$skip"
done
# Others that choose, on the same frozen policy.
for method in deer flexidepth mole; do
    once "$method" baseline --method "$method" --policy "$policy" --data "$data" --layers "$layers" --steps "$steps" \
        --out "$out/$method"
    evaluate "$method" --policy "$out/$method"
done
# Static depth, trained on; and a shallow policy from nothing.
for count in $static; do
    ratio=$(awk "BEGIN { print $count / $depth }")
    once "plan-$count" calibrate --policy "$policy" --data "$data" --static-ratio "$ratio" --out "$out/plan-$count"
    once "static-$count" train --init "$policy" --data "$data" --plan "$out/plan-$count" --drop-dynamic --steps "$steps" \
        --batch 16 --learning-rate 4e-4 --warmup 100 --save-every "$steps" --ema 0.99 --out "$out/static-$count"
    evaluate "static-$count" --policy "$out/static-$count"
done
# shellcheck disable=SC2086 # options are words
once shallow train --data "$data" --layers "$shallow" --steps "$shallow_steps" --batch 32 --learning-rate 5e-4 $shallow_options \
    --out "$out/shallow"
evaluate shallow --policy "$out/shallow"
"$dysl" plot pareto "$out"/eval/*/* --out "$out/pareto.png"
