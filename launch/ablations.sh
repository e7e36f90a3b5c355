#!/usr/bin/env bash
# The ablation table: what each part of layer skipping is worth, on the same episodes as the full model.
# Usage: launch/ablations.sh DEMONSTRATIONS [OUT] [path of the dysl command]
# Three variants are trained differently, and tuned to the time of the shipped one; about two hours on two cores. It may be
# stopped: the same command goes on.
set -eu
data=$1
out=${2:-runs/ablations}
dysl=${3:-dysl}
policy=metaworld-mini
episodes=${EPISODES:-20}

"$dysl" eval --policy "$policy" --episodes "$episodes" --out "$out/parts" \
    --skip-config full,dysl,no-guidance,no-verification,controllers,random

mkdir -p "$out"
echo '{"plan": {"num_layers": 24, "static_layers": [23]}}' > "$out/no-static-split.json"
"$dysl" distill --policy "$policy" --data "$data" --out "$out/no-static-split" --plan "$out/no-static-split.json"
"$dysl" distill --policy "$policy" --data "$data" --out "$out/one-stage" --adapter-steps 0
"$dysl" distill --policy "$policy" --data "$data" --out "$out/mixture" --objective mixture
for variant in no-static-split one-stage mixture; do
    "$dysl" tune --policy "$out/$variant" --data "$data" --target-ms "${TARGET_MS:?milliseconds of the shipped policy, see dysl tune}"
    "$dysl" eval --policy "$out/$variant" --episodes "$episodes" --out "$out/$variant-eval"
done
"$dysl" eval compare "$out/parts/full" "$out"/parts/{dysl,no-guidance,no-verification,controllers,random} "$out"/*-eval
