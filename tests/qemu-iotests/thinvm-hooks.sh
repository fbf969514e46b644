# SPDX-License-Identifier: GPL-2.0-or-later
#
# What thinvm changes for iotests written in shell: common.rc reads this at
# its end, so a function that is defined here replaces upstream's.
#
# Tests that name only qcow2 as their format but test general behaviour run
# for thinvm too if thinvm-tests.txt lists them.  Everything else, and every
# other format, behaves as upstream wrote it.

if [ "$IMGFMT" = "thinvm" ]; then
    # "" if the test is not listed
    thinvm_how=$(awk -v name="$seq" '$1 == name { print $2 }' \
                 "$(dirname "${BASH_SOURCE[0]}")/thinvm-tests.txt")

    # Keep upstream's function $1 under the name upstream$1
    _thinvm_keep()
    {
        eval "$(declare -f "$1" | sed "1s/.*/upstream$1 ()/")"
    }

    case "$thinvm_how" in
    list* | copy*)
        _thinvm_keep _supported_fmt
        _supported_fmt()
        {
            case " $* " in
            *" qcow2 "*)
                set -- "$@" thinvm
                ;;
            esac
            upstream_supported_fmt "$@"
        }
        ;;
    esac

    # Upstream hands the variable CLUSTER_SIZE only to two formats.  Some
    # tests mean by it the unit of discards, which is thinvm's cluster; some
    # the unit that is allocated and reported, for thinvm a sixteenth of it.
    case "$thinvm_how" in
    *+cluster* | *+part*)
        _thinvm_keep _make_test_img
        _make_test_img()
        {
            local size=${CLUSTER_SIZE%[kKM]}
            case "$CLUSTER_SIZE" in
            *[kK])
                size=$((size * 1024))
                ;;
            *M)
                size=$((size * 1024 * 1024))
                ;;
            esac
            case "$thinvm_how" in
            *+part*)
                size=$((size * 16))
                ;;
            esac
            [ $size -lt 16384 ] && size=16384
            [ $size -gt 2097152 ] && size=2097152
            upstream_make_test_img -o "cluster_size=$size" "$@"
        }
        ;;
    esac
fi
