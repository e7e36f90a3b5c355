#!/usr/bin/env bash
# Training of libero-mini from nothing: a policy for libero-goal (nine tasks, without the wine rack) and libero-object (ten
# tasks). The experts' demonstrations, behaviour cloning on them (r0), a round of DAgger on the tasks that it does worst (r1),
# and another, in which its static layers also learn to act as all do (r2); then adapters and controllers for it (r2-fast). The
# same command continues where it was stopped.
# Usage: launch/libero_mini.sh [OUT] [path of the dysl command]
set -eu
out=${1:-runs/libero-mini-training}
dysl=${2:-dysl}
cameras=agentview=128x128,robot0_eye_in_hand=96x96
placing=put_the_bowl_on_the_stove,put_the_wine_bottle_on_top_of_the_cabinet,put_the_bowl_on_top_of_the_cabinet
placing=$placing,put_the_cream_cheese_in_the_bowl,put_the_bowl_on_the_plate
moving=turn_on_the_stove,push_the_plate_to_the_front_of_the_stove,open_the_middle_drawer_of_the_cabinet
moving=$moving,open_the_top_drawer_and_put_the_bowl_inside

once() {
    step=$1
    shift
    [ -e "$out/$step.done" ] || { "$dysl" "$@" && touch "$out/$step.done"; }
}
correct() {
    step=$1 policy=$2 seed=$3 episodes=$4 tasks=$5
    once "$step" demos collect --policy "$out/$policy" --suite libero-goal --seed "$seed" --tasks "$tasks" \
        --episodes "$episodes" --workers 2 --out "$out/demos"
}

mkdir -p "$out"
once demos-placing demos collect --suite libero-goal --tasks "$placing" --episodes 50 --workers 2 --cameras "$cameras" --out "$out/demos"
once demos-object demos collect --suite libero-object --episodes 25 --workers 2 --cameras "$cameras" --out "$out/demos"
once demos-moving demos collect --suite libero-goal --tasks "$moving" --episodes 30 --workers 2 --cameras "$cameras" --out "$out/demos"
once r0 train --data "$out/demos" --out "$out/r0" --crops agentview=96x128+16+0,robot0_eye_in_hand=96x96+0+0 \
    --grids robot0_eye_in_hand=2 --steps 7000 --batch 32 --learning-rate 6e-4 --execute 4 --compile
correct dagger-hard r0 1 50 put_the_wine_bottle_on_top_of_the_cabinet,open_the_top_drawer_and_put_the_bowl_inside
correct dagger-cheese r0 1 40 put_the_cream_cheese_in_the_bowl
correct dagger-bowl r0 1 30 put_the_bowl_on_top_of_the_cabinet,put_the_bowl_on_the_plate
once r1 train --init "$out/r0" --data "$out/demos" --out "$out/r1" --steps 3500 --batch 32 --learning-rate 4e-4 --compile
correct dagger2-bottle r1 2 60 put_the_wine_bottle_on_top_of_the_cabinet
correct dagger2-high r1 2 40 put_the_bowl_on_top_of_the_cabinet,open_the_top_drawer_and_put_the_bowl_inside
once plan calibrate --policy "$out/r1" --data "$out/demos" --longest-block 19 --out "$out/plan"
once r2 train --init "$out/r1" --data "$out/demos" --plan "$out/plan" --out "$out/r2" --steps 4000 --batch 32 \
    --learning-rate 4e-4 --compile
once r2-fast distill --policy "$out/r2" --data "$out/demos" --plan "$out/plan" --frames 80000 --adapter-size 256 \
    --joint-exit-prob 0.9 --adapter-steps 0 --skip-steps 25000 --learning-rate 3e-3 --out "$out/r2-fast"
