/*
 * A fuzzer of thinvm without libFuzzer: runs the inputs that it is given
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * For any compiler, and for inputs that are no images.
 */
#include "qemu/osdep.h"

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int main(int argc, char **argv)
{
    LLVMFuzzerInitialize(&argc, &argv);
    for (int i = 1; i < argc; i++) {
        g_autofree char *data = NULL;
        GError *error = NULL;
        gsize size;

        if (!g_file_get_contents(argv[i], &data, &size, &error)) {
            fprintf(stderr, "%s\n", error->message);
            return 1;
        }
        LLVMFuzzerTestOneInput((uint8_t *)data, size);
    }
    return 0;
}
