#!/bin/sh
# too_few.sh SCRIPT GIVEN: a converter got too few arguments. What it takes stands in its first comment.
set -euf
usage=$(sed '1d; /, as in the earlier system/q' "$1" | sed 's/^# *//; s/ *\\$//; s/, as in the earlier system\.$//')
echo "linear_moe: $(basename -- "$1") got $2 argument(s), too few." >&2
echo "  why: SOURCE and TARGET are what is converted and where to; the places are those of the earlier system." >&2
echo "  try: sh $(dirname -- "$1")/$(echo $usage)" >&2  # unquoted: on one line
exit 2
