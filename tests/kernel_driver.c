/* Calls the kernels of a library as a file on stdin says, and writes to stdout what their memory holds afterwards.
 *
 * Each call: the kernel's name, the name of the function that says how much scratch it needs, its struct, and its
 * blocks of memory, with where in the struct their addresses go. A block is given (0), that of an earlier call (1), or
 * scratch (2). Numbers are of 64 bits; lengths come before names and bytes. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static uint64_t read_number(void) {
    uint64_t number;
    return fread(&number, 8, 1, stdin) == 1 ? number : UINT64_MAX;
}

static void *make_memory(uint64_t length) { return aligned_alloc(64, (length / 64 + 1) * 64); }

static char *read_bytes(uint64_t length) {
    char *bytes = make_memory(length);
    if (length && fread(bytes, length, 1, stdin) != 1) exit(3);
    bytes[length] = 0;
    return bytes;
}

int main(int argc, char **argv) {
    void *library = argc == 2 ? dlopen(argv[1], RTLD_NOW) : 0, **blocks = 0;
    uint64_t num_blocks = 0, length;
    if (!library) return fprintf(stderr, "%s\n", dlerror()), 2;
    while ((length = read_number()) != UINT64_MAX) {
        void (*kernel)(const void *) = (void (*)(const void *))dlsym(library, read_bytes(length));
        int64_t (*count)(const void *) = (int64_t(*)(const void *))dlsym(library, read_bytes(read_number()));
        char *arguments = read_bytes(read_number());
        if (!kernel) return fprintf(stderr, "%s\n", dlerror()), 2;
        for (uint64_t left = read_number(); left; left--) {
            void **address = (void **)(arguments + read_number());
            const uint64_t kind = read_number();
            blocks = realloc(blocks, ++num_blocks * sizeof *blocks);
            if (kind == 0)
                *address = read_bytes(read_number());
            else if (kind == 1)
                *address = blocks[read_number()];
            else
                *address = make_memory((uint64_t)count(arguments));
            blocks[num_blocks - 1] = *address;
        }
        kernel(arguments);
        for (uint64_t left = read_number(); left; left--) {
            const uint64_t which = read_number();
            fwrite(blocks[which], read_number(), 1, stdout);
        }
    }
    return 0;
}
