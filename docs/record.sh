#!/bin/sh
# Records docs/run.svg, the picture at the top of README.md: the daemon and one self-connection, in a real
# terminal.
#
#     cargo xtask build
#     sudo sh docs/record.sh
#
# It needs root (the daemon loads BPF programs), python3 with venv, and unshare from util-linux. The recorder
# and the renderer are pinned below; they are installed into target/record and nowhere else. The recording
# shows every self-connection of the host, so nothing else should make one meanwhile.
#
# One thing is edited: the kernel's release is shown without its local suffix (6.18.44 instead of
# 6.18.44-local), because the suffix names one machine's build.
set -eu

COLUMNS_SHOWN=150
LINES_RECORDED=50

prompt() {
    printf '\033[32m$\033[0m \033[1m%s\033[0m\n' "$1"
}

# The commands that are recorded, with a prompt before each. The pauses give the daemon time to print.
if [ "${1-}" = scene ]; then
    unset NO_COLOR
    printf '\033[?25l' # no cursor in the picture
    prompt 'selfconn run &'
    selfconn run &
    daemon=$!
    sleep 1.5
    prompt 'selfconn repro --mode retry >/dev/null'
    selfconn repro --mode retry >/dev/null
    sleep 1
    prompt 'kill -INT %1'
    kill -INT "$daemon"
    wait "$daemon"
    exit
fi

cd "$(dirname "$0")/.."
PATH="$PWD/target/release:$PATH"
export PATH
work="$PWD/target/record"
script="$PWD/docs/record.sh"
mkdir -p "$work"

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet \
    asciinema==2.4.0 termtosvg-ng==1.4.1 lxml==6.1.3 pyte==0.8.2 wcwidth==0.9.4

# A network namespace of its own, with the usual port range: the attempts leave the host's ports alone.
unshare --net sh -c "
    ip link set lo up
    TERM=xterm-256color exec '$work/venv/bin/asciinema' rec --quiet --overwrite \
        --cols $COLUMNS_SHOWN --rows $LINES_RECORDED --command \"sh '$script' scene\" '$work/run.cast'
"

# The local suffix of the kernel's release ends at a space, or at the backslash of an escape in the recording.
sed -E 's/(kernel [0-9]+(\.[0-9]+)+)-[^ "\\]*/\1/' "$work/run.cast" >"$work/masked.cast"

# The picture is as high as the text: how many lines that is, is known only after the recording.
height=$("$work/venv/bin/python" - "$work/masked.cast" <<'PYTHON'
import json, sys, pyte
header, *events = map(json.loads, open(sys.argv[1]))
screen = pyte.Screen(header["width"], header["height"])
stream = pyte.Stream(screen)
for _, _, text in events:
    stream.feed(text)
print(screen.cursor.y + 1)
PYTHON
)
sed -i "1s/\"height\": $LINES_RECORDED/\"height\": $height/" "$work/masked.cast"

# One still frame for each moment; the last one shows all.
rm -rf "$work/frames"
mkdir "$work/frames"
"$work/venv/bin/termtosvg" render "$work/masked.cast" "$work/frames" --still-frames --template window_frame
last=$(find "$work/frames" -name '*.svg' | sort | tail -n 1)
# For renderers that know neither the style `white-space: pre` nor the attribute `textLength`: spaces are kept,
# and a letter of the font is as wide as a column (8 pixels).
sed -e 's/<svg id="screen"/<svg id="screen" xml:space="preserve"/' -e 's/font-size: 14px/font-size: 13.29px/' \
    "$last" >docs/run.svg
echo "docs/run.svg is written"
