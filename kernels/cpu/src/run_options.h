// What pocketforge-run is asked for.
#pragma once

#include <errno.h>

#include "common.h"

namespace {

struct Options {
    const char *model = nullptr, *ids = nullptr, *kv = "f16", *clock = "wall";
    int prompt = 128, decode = 32, threads = 1, repeats = 5, batch = 0, context = 0, verify = 0, bandwidth_mib = 256;
};

constexpr int kMostTokens = 100000000;

const char kUsage[] =
    "usage: pocketforge-run MODEL [--prompt-tokens N] [--decode-tokens N] [--threads N] [--repeats N]\n"
    "                       [--kv f32|f16|int8] [--batch N] [--context N] [--bandwidth-mib N] [--verify 1]\n"
    "                       [--clock wall|cpu]    cpu: processor time, of one thread; on a machine that others use too\n"
    "       pocketforge-run MODEL --ids 1,2,3 --decode-tokens N    continue these ids greedily\n";

int fail(const char *text) {
    fprintf(stderr, "error: %s\n", text);
    return 2;
}

// A whole number from 0 to `most`, ended by `end` or the end of the text.
bool whole(const char *text, long most, char end, long *value, const char **after) {
    char *stop = nullptr;
    errno = 0;
    *value = strtol(text, &stop, 10);
    *after = stop;
    return *text >= '0' && *text <= '9' && errno == 0 && *value <= most && (*stop == '\0' || *stop == end);
}

// 0, or the exit status of what is wrong.
int parse(int argc, char **argv, Options *options) {
    char text[160];
    for (int i = 1; i < argc; ++i) {
        const char *name = argv[i];
        if (strncmp(name, "--", 2) != 0) {
            if (options->model != nullptr) {
                snprintf(text, sizeof text, "%.60s: a second model; expected options after the first", name);
                return fail(text);
            }
            options->model = name;
            continue;
        }
        const struct { const char *name; int *value; int least, most; } numbers[] = {
            {"--prompt-tokens", &options->prompt, 1, kMostTokens}, {"--decode-tokens", &options->decode, 1, kMostTokens},
            {"--threads", &options->threads, 0, kMostTokens},      {"--repeats", &options->repeats, 1, 1000000},
            {"--batch", &options->batch, 0, kMostTokens},          {"--context", &options->context, 0, kMostTokens},
            {"--verify", &options->verify, 0, 1},                  {"--bandwidth-mib", &options->bandwidth_mib, 0, 65536},
        };
        const struct { const char *name; const char **value; } texts[] = {
            {"--ids", &options->ids}, {"--kv", &options->kv}, {"--clock", &options->clock}};
        const char *value = i + 1 < argc ? argv[i + 1] : nullptr;
        bool known = false;
        for (const auto &number : numbers) {
            if (strcmp(name, number.name) != 0) continue;
            long found = 0;
            const char *after = nullptr;
            if (value == nullptr || !whole(value, number.most, '\0', &found, &after) || found < number.least) {
                snprintf(text, sizeof text, "%s %.60s: expected a whole number from %d to %d", name, value == nullptr ? "" : value,
                         number.least, number.most);
                return fail(text);
            }
            *number.value = int(found);
            known = true;
        }
        for (const auto &one : texts) {
            if (strcmp(name, one.name) != 0) continue;
            if (value == nullptr) {
                snprintf(text, sizeof text, "%s: its value is missing", name);
                return fail(text);
            }
            *one.value = value;
            known = true;
        }
        if (!known) {
            snprintf(text, sizeof text, "%.60s: no such option; pocketforge-run --help lists them", name);
            return fail(text);
        }
        ++i;
    }
    bool cpu = strcmp(options->clock, "cpu") == 0;
    if (!cpu && strcmp(options->clock, "wall") != 0) return fail("--clock: expected wall or cpu");
    if (cpu && options->threads != 1) return fail("--clock cpu: processor time adds up over threads; expected --threads 1");
    return options->model != nullptr ? 0 : fail("MODEL is missing; pocketforge-run --help says how it is called");
}

} // namespace
