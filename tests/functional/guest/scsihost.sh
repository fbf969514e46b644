#!/bin/busybox sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# The init of a guest that stands for a host with SCSI devices: /dev/sda and
# /dev/sdb are two initiators' views of one logical unit.  They come from
# outside, or, with "lio" on the command line, from the kernel's own target on
# /dev/vda.  A shell on a virtio port does the rest, see lib/scsihost.py.

/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in /modules/*; do
    insmod "$module" || echo "insmod $module fails"
done
mount -t configfs configfs /sys/kernel/config
echo scsihost > /proc/sys/kernel/hostname

T=/sys/kernel/config/target
LU=$T/core/fileio_0/lu

# scsi_host NAME: what logs in as NAME sees the logical unit as its disk
scsi_host()
{
    mkdir -p "$T/loopback/naa.600140500000$1/tpgt_1"
    echo "naa.600140599999$1" > "$T/loopback/naa.600140500000$1/tpgt_1/nexus"
    mkdir "$T/loopback/naa.600140500000$1/tpgt_1/lun/lun_0"
    ln -s $LU "$T/loopback/naa.600140500000$1/tpgt_1/lun/lun_0/port"
}

no_scsi_host()
{
    rm "$T/loopback/naa.600140500000$1/tpgt_1/lun/lun_0/port"
    rmdir "$T/loopback/naa.600140500000$1/tpgt_1/lun/lun_0"
    rmdir "$T/loopback/naa.600140500000$1/tpgt_1"
    rmdir "$T/loopback/naa.600140500000$1"
}

# target_on: the array gets power.  What it had stored of reservations that
# are to survive, it knows again (here: in a file that the kernel has written).
target_on()
{
    mkdir -p $LU
    echo "fd_dev_name=/dev/vda,fd_dev_size=$(blockdev --getsize64 /dev/vda)" \
        > $LU/control
    echo thinvmtest > $LU/wwn/vpd_unit_serial
    echo 1 > $LU/enable
    if [ -s /var/target/pr/aptpl_thinvmtest ]; then
        while read -r line; do
            case $line in
            PR_REG_START*) all= ;;
            PR_REG_END*) printf '%s' "${all#,}" > $LU/pr/res_aptpl_metadata ;;
            *) all="$all,$line" ;;
            esac
        done < /var/target/pr/aptpl_thinvmtest
    fi
    scsi_host aaaa
    wait_for /dev/sda
    scsi_host bbbb
    wait_for /dev/sdb
}

target_off()
{
    no_scsi_host aaaa
    no_scsi_host bbbb
    rmdir $LU
}

wait_for()
{
    while [ ! -e "$1" ]; do
        usleep 50000
    done
}

mkdir -p /var/target/pr
case $(cat /proc/cmdline) in
*" lio"*) target_on ;;
esac
wait_for /dev/sda
wait_for /dev/sdb
chmod 666 /dev/sda /dev/sdb
for port in /sys/class/virtio-ports/*; do
    ln -s "/dev/${port##*/}" "/dev/port-$(cat "$port/name")"
    chmod 666 "/dev/${port##*/}"
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
