#!/bin/busybox sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# The init of a guest that stands for a host with LVM on shared disks.  A shell
# on a virtio port does the rest, see lib/lvmhost.py.

/bin/busybox --install -s /bin
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /run/lock/lvm /run/lvm /run/vm /root
mount -t tmpfs shm /dev/shm
for module in /modules/*; do
    insmod "$module" || echo "insmod $module fails"
done
for word in $(cat /proc/cmdline); do
    case $word in
    host_id=*) host_id=${word#host_id=} ;;
    esac
done
hostname "host$host_id"
sed -i "s/HOST_ID/$host_id/" /etc/lvm/lvmlocal.conf
ip link set lo up 2> /dev/null

wait_for()
{
    while [ ! -e "$1" ]; do
        usleep 50000
    done
}

# locks_on: what the units wdmd, sanlock and lvmlockd do
locks_on()
{
    wdmd -G root && sanlock daemon -U root -G root && lvmlockd || return
    until sanlock client status > /dev/null; do usleep 100000; done
    until lvmlockctl --info > /dev/null; do usleep 100000; done
}

# lines_of COMMAND FROM TO SEED: for qemu-io, a MiB each with its own pattern,
# 32 at a time
lines_of()
{
    n=$2
    while [ "$n" -lt "$3" ]; do
        echo "$1 -P $(((n + $4) % 255 + 1)) ${n}M 1M"
        n=$((n + 1))
        [ $((n % 32)) -ne 0 ] || echo aio_flush
    done
    echo aio_flush
    echo flush
}

# disk_do COMMAND FROM TO SEED PORT: on the disk that the storage daemon of
# that port offers.  A client of its NBD export is told that there is no space,
# where a guest would stand still: it waits, and does the part once more.
disk_do()
{
    begin=$(cut -d ' ' -f 1 /proc/uptime)
    from=$2
    pauses=0
    while [ "$from" -lt "$3" ]; do
        to=$((from + 128))
        [ "$to" -le "$3" ] || to=$3
        lines_of "$1" "$from" "$to" "$4" > "/tmp/$5.lines"
        qemu-io -f raw "nbd+unix:///disk?socket=/run/vm/$5.nbd" \
            < "/tmp/$5.lines" > "/tmp/$5.io" 2>&1
        if grep -q 'No space left' "/tmp/$5.io" && [ "$pauses" -lt 300 ]; then
            pauses=$((pauses + 1))
            sleep 1
            continue
        fi
        good=$(grep -c -E '(wrote|read) 1048576/1048576' "/tmp/$5.io")
        if [ "$good" -ne $((to - from)) ] ||
            grep -i -E 'fail|error' "/tmp/$5.io"; then
            echo "only $good MiB from $from on are good"
            return 1
        fi
        from=$to
    done
    echo "$1 $2 to $3 MiB from $begin to $(cut -d ' ' -f 1 /proc/uptime)," \
        "pauses: $pauses"
}

# disk_of SERIAL: sda, sdb, ...
disk_of()
{
    for disk in /sys/block/sd*; do
        if tail -c +5 "$disk/device/vpd_pg80" | grep -q "^$1$"; then
            echo "${disk##*/}"
        fi
    done
}

# Without udev the first attempt may come before the node of the lock volume
lock_start()
{
    vgchange --lock-start "$1" || vgchange --lock-start "$1"
}

wait_for /dev/sda
for port in /sys/class/virtio-ports/*; do
    ln -s "/dev/${port##*/}" "/dev/port-$(cat "$port/name")"
done
exec 0<> /dev/port-shell 1>&0 2>&1
echo ready
while read -r line; do
    eval "$line"
    status=$?
    # What was printed may have no end of line.
    echo
    echo "END $status"
done
