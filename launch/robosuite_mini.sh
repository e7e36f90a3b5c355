#!/usr/bin/env bash
# Training of robosuite-mini from nothing, in about six and a half hours on two cores (the sum of its steps). The same command
# continues where it was stopped. Usage: launch/robosuite_mini.sh [OUT] [path of the dysl command]
# The experts' demonstrations, and two rounds of DAgger, make the full model (r2). Heads for it (r2-fast, r2-fast-2) then act,
# so that training knows the moments that a policy that skips layers meets. On those alone the full model is trained further,
# and its static layers learn to act as all do (r3); its heads (r3-fast) act again, and r4-fast, of the last round, is what is
# shipped. Its provenance.json has other names: rs for demos, fast for reached, robosuite-mini for r2 and r2-fast (as it
# was shipped before), rf3 for r2-fast-2, plan20 for plan-3, s1 for r3-fast and s2 for r4-fast.
set -eu
out=${1:-runs/robosuite-mini-training}
dysl=${2:-dysl}

once() {
    step=$1
    shift
    [ -e "$out/$step.done" ] || { "$dysl" "$@" && touch "$out/$step.done"; }
}
collect() {
    step=$1 policy=$2 seed=$3 tasks=$4 episodes=$5 data=$6
    once "$step" demos collect --policy "$out/$policy" --seed "$seed" --tasks "$tasks" --episodes "$episodes" --workers 2 \
        --out "$out/$data"
}

mkdir -p "$out"
once demos demos collect --suite robosuite-5 --episodes 120 --workers 2 --out "$out/demos"
once r0 train --data "$out/demos" --out "$out/r0" --crops agentview=96x128+8+0,robot0_eye_in_hand=80x96+0+0 \
    --grids robot0_eye_in_hand=2 --steps 4000 --batch 32 --learning-rate 6e-4
collect dagger1 r0 1 lift,stack,door,pick-place-can 40 demos
collect dagger1-nut r0 1 nut-assembly-square 75 demos
once r1 train --init "$out/r0" --data "$out/demos" --out "$out/r1" --steps 4500 --batch 32 --learning-rate 4e-4
collect dagger2 r1 2 lift,door,pick-place-can 30 demos
collect dagger2-long r1 2 stack,nut-assembly-square 60 demos
once r2 train --init "$out/r1" --data "$out/demos" --out "$out/r2" --steps 10000 --batch 32 --learning-rate 5e-4 --compile
once r2-fast distill --policy "$out/r2" --data "$out/demos" --frames 60000 --skip-steps 60000 --out "$out/r2-fast"
collect reached r2-fast 3 lift,stack,nut-assembly-square 90 reached
collect reached-rest r2-fast 3 door,pick-place-can 50 reached
collect reached-more r2-fast 4 lift,stack,nut-assembly-square 110 reached
collect reached-more-rest r2-fast 4 door,pick-place-can 60 reached
once plan-4 calibrate --policy "$out/r2" --data "$out/reached" --static-ratio 0.17 --longest-block 12 --out "$out/plan-4"
once r2-fast-2 distill --policy "$out/r2" --data "$out/reached" --plan "$out/plan-4" --frames 80000 --augment-copies 1 \
    --adapter-size 256 --joint-exit-prob 0.9 --skip-steps 45000 --out "$out/r2-fast-2"
collect corrected r2-fast-2 5 stack,nut-assembly-square 110 reached
collect corrected-rest r2-fast-2 5 lift,door,pick-place-can 30 reached
once plan-3 calibrate --policy "$out/r2" --data "$out/reached" --longest-block 19 --out "$out/plan-3"
once r3 train --init "$out/r2" --data "$out/reached" --plan "$out/plan-3" --out "$out/r3" --steps 10000 --batch 32 \
    --learning-rate 4e-4 --compile
once r3-fast distill --policy "$out/r3" --data "$out/reached" --plan "$out/plan-3" --frames 120000 --adapter-size 256 \
    --joint-exit-prob 0.9 --adapter-steps 0 --skip-steps 25000 --learning-rate 3e-3 --out "$out/r3-fast"
collect again r3-fast 6 stack,nut-assembly-square 100 reached
collect again-rest r3-fast 6 lift,door,pick-place-can 20 reached
once r4 train --init "$out/r3" --data "$out/reached" --plan "$out/plan-3" --out "$out/r4" --steps 4500 --batch 32 \
    --learning-rate 3e-4 --compile
once r4-fast distill --policy "$out/r4" --data "$out/reached" --plan "$out/plan-3" --frames 130000 --adapter-size 256 \
    --joint-exit-prob 0.9 --adapter-steps 0 --skip-steps 16000 --learning-rate 3e-3 --out "$out/r4-fast"
"$dysl" eval --policy "$out/r4-fast" --episodes 10 --variants full,dysl --out "$out/eval"
