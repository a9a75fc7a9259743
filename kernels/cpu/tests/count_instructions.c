/* A plugin for qemu-aarch64: how many instructions each function ran, and how many of them were products, loads and stores.
 *
 *     gcc -O2 -shared -fPIC -o count_instructions.so count_instructions.c
 *     qemu-aarch64 -plugin ./count_instructions.so -d plugin PROGRAM
 *
 * One line a function: its symbol, then instructions, sdot, smmla, loads, stores. The counts are the same in every run, so a
 * test can compare them exactly. What is used of QEMU's plugin interface, version 1, is declared here: Debian has no header. */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;

extern void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id, void (*callback)(plugin_id, struct qemu_plugin_tb *));
extern void qemu_plugin_register_atexit_cb(plugin_id id, void (*callback)(plugin_id, void *), void *data);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
extern struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *block, size_t index);
extern const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *instruction);
extern const char *qemu_plugin_insn_symbol(const struct qemu_plugin_insn *instruction);
extern void qemu_plugin_register_vcpu_insn_exec_inline(struct qemu_plugin_insn *instruction, int operation, void *target,
                                                       uint64_t value);
extern void qemu_plugin_outs(const char *text);

EXPORT int qemu_plugin_version = 1;

enum { ALL, SDOT, SMMLA, LOAD, STORE, KINDS };
enum { ADD_U64 = 0, MOST_FUNCTIONS = 8192 };

static struct function {
    char symbol[256];
    uint64_t counts[KINDS];
} functions[MOST_FUNCTIONS];
static int function_count;

static struct function *function_of(const char *symbol) {
    if (symbol == NULL) symbol = "?";
    for (int i = 0; i < function_count; ++i) {
        if (strncmp(functions[i].symbol, symbol, sizeof functions[i].symbol - 1) == 0) return &functions[i];
    }
    if (function_count == MOST_FUNCTIONS) return &functions[MOST_FUNCTIONS - 1];
    snprintf(functions[function_count].symbol, sizeof functions[0].symbol, "%s", symbol);
    return &functions[function_count++];
}

/* The Arm architecture's tables: SDOT (by element and by vector), SMMLA, and the group of loads and stores. */
static int kind_of(uint32_t word) {
    if ((word & 0xbfc0f400u) == 0x0f80e000u || (word & 0xbfe0fc00u) == 0x0e809400u) return SDOT;
    if ((word & 0xffe0fc00u) == 0x4e80a400u) return SMMLA;
    if ((word & 0x0a000000u) != 0x08000000u) return ALL;
    uint32_t two = word >> 22 & 3u, size = word >> 30;
    bool vector = (word >> 26 & 1u) != 0;
    if ((word & 0x3b000000u) == 0x18000000u) return !vector && size == 3 ? ALL : LOAD; /* from beside the code, or its prefetch */
    if ((word & 0x38000000u) == 0x38000000u && !vector) {
        if (size == 3 && two == 2) return ALL; /* a prefetch */
        return two == 0 ? STORE : LOAD;        /* 2 and 3 are loads that extend a sign */
    }
    return (two & 1u) != 0 ? LOAD : STORE;
}

static void translate(plugin_id id, struct qemu_plugin_tb *block) {
    (void)id;
    for (size_t i = 0, count = qemu_plugin_tb_n_insns(block); i < count; ++i) {
        struct qemu_plugin_insn *instruction = qemu_plugin_tb_get_insn(block, i);
        uint64_t *counts = function_of(qemu_plugin_insn_symbol(instruction))->counts;
        uint32_t word;
        memcpy(&word, qemu_plugin_insn_data(instruction), sizeof word);
        int kind = kind_of(word);
        qemu_plugin_register_vcpu_insn_exec_inline(instruction, ADD_U64, &counts[ALL], 1);
        if (kind != ALL) qemu_plugin_register_vcpu_insn_exec_inline(instruction, ADD_U64, &counts[kind], 1);
    }
}

static void print(plugin_id id, void *data) {
    (void)id, (void)data;
    char line[512];
    for (int i = 0; i < function_count; ++i) {
        const uint64_t *c = functions[i].counts;
        snprintf(line, sizeof line, "%.255s %llu %llu %llu %llu %llu\n", functions[i].symbol, (unsigned long long)c[ALL],
                 (unsigned long long)c[SDOT], (unsigned long long)c[SMMLA], (unsigned long long)c[LOAD], (unsigned long long)c[STORE]);
        qemu_plugin_outs(line);
    }
}

EXPORT int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv) {
    (void)info, (void)argc, (void)argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translate);
    qemu_plugin_register_atexit_cb(id, print, NULL);
    return 0;
}
