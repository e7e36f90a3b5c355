#!/usr/bin/env bash
# Training of libero-mini from nothing, in about two and a half hours on two cores: libero-goal (nine tasks, without the wine
# rack) and libero-object (ten tasks). The experts' demonstrations, behaviour cloning on them (r0), and a round of DAgger on the
# tasks that are done worst (r1), in which static layers also learn to act as all do; then adapters and controllers (r1-fast).
# The same command continues where it was stopped.
# Usage: launch/libero_mini.sh [OUT] [path of the dysl command]
set -eu
out=${1:-runs/libero-mini-training}
dysl=${2:-dysl}
cameras=agentview=128x128,robot0_eye_in_hand=96x96
bottle=put_the_wine_bottle_on_top_of_the_cabinet
drawer=open_the_top_drawer_and_put_the_bowl_inside
cabinet=put_the_bowl_on_top_of_the_cabinet
cheese=put_the_cream_cheese_in_the_bowl
plate=put_the_bowl_on_the_plate
others=turn_on_the_stove,push_the_plate_to_the_front_of_the_stove,open_the_middle_drawer_of_the_cabinet

once() {
    step=$1
    shift
    [ -e "$out/$step.done" ] || { "$dysl" "$@" && touch "$out/$step.done"; }
}
demonstrate() {
    once "$1" demos collect --suite "$2" --tasks "$3" --episodes "$4" --workers 2 --cameras "$cameras" --out "$out/demos"
}
correct() {
    once "$1" demos collect --policy "$out/$2" --suite libero-goal --seed "$3" --tasks "$4" --episodes "$5" --workers 2 \
        --out "$out/demos"
}
mkdir -p "$out"
demonstrate placing libero-goal "put_the_bowl_on_the_stove,$bottle,$cabinet,$cheese,$plate" 50
once object demos collect --suite libero-object --episodes 25 --workers 2 --cameras "$cameras" --out "$out/demos"
demonstrate moving libero-goal "$others,$drawer" 30
once r0 train --data "$out/demos" --out "$out/r0" --crops agentview=96x128+16+0,robot0_eye_in_hand=96x96+0+0 \
    --grids robot0_eye_in_hand=2 --steps 4000 --batch 32 --learning-rate 6e-4 --execute 4 --compile
once plan calibrate --policy "$out/r0" --data "$out/demos" --longest-block 19 --out "$out/plan"
correct first r0 1 "$bottle,$drawer,$cheese" 40
correct first-bowl r0 1 "$cabinet,$plate" 30
once r1 train --init "$out/r0" --data "$out/demos" --plan "$out/plan" --out "$out/r1" --steps 4200 --batch 32 \
    --learning-rate 5e-4 --compile
once r1-fast distill --policy "$out/r1" --data "$out/demos" --plan "$out/plan" --frames 60000 --fit-frames 20000 \
    --adapter-size 256 --joint-exit-prob 0.9 --adapter-steps 0 --skip-steps 6000 --learning-rate 3e-3 --out "$out/r1-fast"
