#!/usr/bin/env bash
# Text to scores, in about a minute on a CPU: sentences as long as in training, and twice as long.
#
#   bash examples/translation/run.sh                      words mapped one by one
#   bash examples/translation/run.sh --reverse            and last word first
#   bash examples/translation/run.sh --reverse -- --position-method sinusoidal
#
# What stands behind -- goes to fairseq-train. OUT names the folder (default: translation-out).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${OUT:-translation-out}
case ${1:-} in -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit ;; esac
pairs=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do pairs+=("$1"); shift; done
[ $# -gt 0 ] && shift

rm -rf "$out"/{text,bin,checkpoints}  # of an earlier run
python "$here/make_pairs.py" "$out/text" ${pairs[@]+"${pairs[@]}"}
fairseq-preprocess -s src -t tgt --destdir "$out/bin" \
  --trainpref "$out/text/train" --validpref "$out/text/valid" \
  --testpref "$out/text/test,$out/text/long"
fairseq-train "$out/bin" --task translation -s src -t tgt --save-dir "$out/checkpoints" \
  --arch transformer_tiny --encoder-attention-heads 4 --decoder-attention-heads 4 \
  --encoder-normalize-before --decoder-normalize-before --dropout 0 \
  --optimizer adam --lr 0.005 --lr-scheduler cosine --warmup-updates 50 \
  --lr-period-updates 450 --min-lr 1e-5 --clip-norm 1 --max-update 500 --max-tokens 2000 \
  --criterion label_smoothed_cross_entropy --label-smoothing 0.1 \
  --eval-bleu --eval-bleu-args '{"beam": 1, "max_len_a": 1.2, "max_len_b": 5}' \
  --best-checkpoint-metric bleu --maximize-best-checkpoint-metric \
  --no-epoch-checkpoints --validate-interval 5 --num-workers 0 --log-format simple "$@"
results=()
for subset in test test1; do
  fairseq-generate "$out/bin" --task translation -s src -t tgt --gen-subset "$subset" \
    --path "$out/checkpoints/checkpoint_best.pt" --beam 4 --max-len-a 1.2 --max-len-b 5 \
    --batch-size 50 --num-workers 0 --results-path "$out"
  grep ^D- "$out/generate-$subset.txt" | sort -V | cut -f3 > "$out/$subset.hyp"
  grep ^T- "$out/generate-$subset.txt" | sort -V | cut -f2 > "$out/$subset.ref"
  results+=("$(fairseq-score -s "$out/$subset.hyp" -r "$out/$subset.ref" | tail -n 1)")
done
echo
echo "sentences as long as in training:  ${results[0]}"
echo "sentences twice as long:           ${results[1]}"
echo "outputs, scores and references:    $out/generate-test.txt, $out/generate-test1.txt"
