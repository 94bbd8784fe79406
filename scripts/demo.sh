#!/usr/bin/env bash
# The whole way on phantoms: install, make data, plan, pretrain, fine-tune, train from scratch, predict, compare.
#
#   bash scripts/demo.sh [FOLDER]       FOLDER (default: ./pcrl_demo) takes everything, the virtual environment too
#
# PCRL_VENV    another virtual environment (default: FOLDER/venv; made if it is not there)
# PYTHON       the Python it is made with (default: the first from 3.10 on PATH)
# PCRL_DEMO_QUICK=1  a few steps of each training: only for tests of this script; the result then means nothing
#
# Six to ten minutes on two cores. Ends with status 1 if the pretraining restores nothing or the lesion is not found.
# Run it again to do everything again; only the virtual environment is kept. To clean up, delete FOLDER.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$repo/scripts/venv.sh"

demo=${1:-pcrl_demo}
[ -e "$demo/made_by_demo.sh" ] || [ -z "$(ls -A "$demo" 2>/dev/null)" ] ||
    fail "$demo is not empty and was not made by this script: name another folder, bash scripts/demo.sh FOLDER"
mkdir -p "$demo"
demo=$(cd "$demo" && pwd)
touch "$demo/made_by_demo.sh"

install_into "${PCRL_VENV:-$demo/venv}" "$repo"

rm -rf "$demo"/{nnUNet_raw,nnUNet_preprocessed,nnUNet_results,predictions,logs}
mkdir -p "$demo"/{nnUNet_raw,nnUNet_preprocessed,nnUNet_results,predictions,logs}
export nnUNet_raw=$demo/nnUNet_raw nnUNet_preprocessed=$demo/nnUNet_preprocessed nnUNet_results=$demo/nnUNet_results
unset nnUNet_extTrainer
export nnUNet_n_proc_DA=${nnUNet_n_proc_DA:-1} nnUNet_def_n_proc=${nnUNet_def_n_proc:-2} nnUNet_compile=f
# Threads that wait without spinning: where something else wants the two cores, too, a step is ten times faster.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
device=$(python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
raw=$nnUNet_raw/Dataset901_PhantomSimple
plan=$nnUNet_preprocessed/Dataset901_PhantomSimple
results=$nnUNet_results/Dataset901_PhantomSimple
number=0
SECONDS=0

run() { # COMMAND...: shown, its output in a log, its end shown if it fails
    local log command second start=$SECONDS
    number=$((number + 1))
    log=$demo/logs/$(printf '%02d' "$number")_$(basename "$1").log
    printf '$ %s\n' "$*"
    "$@" >"$log" 2>&1 </dev/null &
    command=$!
    for ((second = 1; ; second++)); do
        sleep 1
        if ! kill -0 "$command" 2>/dev/null; then break; fi
        if ((second % 20 == 0)); then printf '    %d s: %s\n' "$((SECONDS - start))" "$(tail -n 1 "$log" | cut -c -100)"; fi
    done
    if ! wait "$command"; then
        tail -n 20 "$log" >&2
        fail "this command failed; its whole output is in $log"
    fi
    printf '    %d s, log: %s\n' "$((SECONDS - start))" "$log"
}

labelled=24 unlabelled=24 test=4
if [ -n "${PCRL_DEMO_QUICK:-}" ]; then labelled=8 unlabelled=2 test=1; fi
say "1 Data: $labelled labelled phantoms, $unlabelled without labels, $test to test on, 32x36x28 voxels, easy ones"
run python "$repo/scripts/phantom.py" -o "$nnUNet_raw" -d 901 -kind simple -size 32 36 28 -cases "$labelled" \
    -test "$test" -unlabelled "$unlabelled"

say "2 nnU-Net finds our trainers"
run pcrl_nnunet_register

say "3 nnU-Net plans and preprocesses; the scans without labels go through the same plan"
run nnUNetv2_plan_and_preprocess -d 901 -c 3d_fullres -np 2 -npfp 2
run pcrl_nnunet_preprocess -d 901 -i "$raw/imagesUn" -np 2

# AdamW at this rate and the small weight let a small network restore images within 300 steps: with the defaults the
# gradients of the comparison are many times those of the restoration at first.
say "4 To be quick: three stages and a quarter of the network's width, short trainings, labels of 6 cases only"
printf 'Written into %s and splits_final.json\n' "$plan/nnUNetPlans.json"
python - "$plan" <<'PYTHON'
import json, os, pathlib, sys

quick = bool(os.environ.get("PCRL_DEMO_QUICK"))
folder = pathlib.Path(sys.argv[1])
plan = json.loads((folder / "nnUNetPlans.json").read_text())
network = plan["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
stages = network["n_stages"] = 3
for name in ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage"):
    network[name] = network[name][:stages]
network["n_conv_per_stage_decoder"] = network["n_conv_per_stage_decoder"][:stages - 1]
network["features_per_stage"] = [width // 4 for width in network["features_per_stage"]]
plan["pcrl"] = {
    "pretrain": {
        "epochs": 2 if quick else 10, "iters_per_epoch": 2 if quick else 30, "batch_size": 4,
        "optimizer": "adamw", "initial_lr": 3e-3, "pcrlv2": {"comparison_weight": 0.1},
    },
    "finetune": {
        "epochs": 1 if quick else 5, "iters_per_epoch": 2 if quick else 50, "val_iters_per_epoch": 2
    },
}
(folder / "nnUNetPlans.json").write_text(json.dumps(plan, indent=4))
cases = [f"case_tr_{i:03d}" for i in range(8)]
(folder / "splits_final.json").write_text(json.dumps([{"train": cases[:6], "val": cases[6:]}]))
PYTHON

say "5 Pretraining on all $((labelled + unlabelled)) cases, without labels (minutes)"
run pcrl_nnunet_pretrain -d 901 -device "$device"

say "6 Fine-tuning on 6 labelled cases, and the same training from scratch (minutes each)"
run nnUNetv2_train 901 3d_fullres 0 -tr PCRLFinetuneTrainer -device "$device"
run nnUNetv2_train 901 3d_fullres 0 -tr PCRLScratchTrainer -device "$device"

say "7 Prediction (without mirroring, to be quick) and evaluation of the $test test cases, which no training has seen"
for trainer in PCRLFinetuneTrainer PCRLScratchTrainer; do
    out=$demo/predictions/$trainer
    run nnUNetv2_predict -d 901 -i "$raw/imagesTs" -o "$out" -f 0 -c 3d_fullres -tr "$trainer" -device "$device" \
        -npp 1 -nps 1 --disable_tta
    run nnUNetv2_evaluate_folder "$raw/labelsTs" "$out" -djfile "$raw/dataset.json" -pfile "$plan/nnUNetPlans.json" -np 2
done

say "Result after $((SECONDS / 60)) min $((SECONDS % 60)) s"
python "$repo/scripts/demo_report.py" -raw "$raw" -o "$demo/predictions.png" \
    -pretraining "$results/PCRLPretrainTrainer_pcrlv2__nnUNetPlans__3d_fullres/fold_all" -predictions \
    "scratch=$demo/predictions/PCRLScratchTrainer" "pretrained=$demo/predictions/PCRLFinetuneTrainer" || worked=$?
cat <<TEXT

Pictures
  pretraining   $results/PCRLPretrainTrainer_pcrlv2__nnUNetPlans__3d_fullres/fold_all/report.html
  fine-tuning   $results/PCRLFinetuneTrainer__nnUNetPlans__3d_fullres/fold_0/progress.png
  scratch       $results/PCRLScratchTrainer__nnUNetPlans__3d_fullres/fold_0/progress.png
  predictions   $demo/predictions.png
TEXT
[ -n "${PCRL_DEMO_QUICK:-}" ] || exit "${worked:-0}"
