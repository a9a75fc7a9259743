// pocketforge-run: measures a packed model, or continues token ids. Prints one JSON object; needs nothing but the model.
#include <errno.h>
#include <sys/resource.h>
#include <time.h>

#include "common.h"

namespace {

struct Options {
    const char *model = nullptr, *ids = nullptr, *kv = "f16";
    int prompt = 128, decode = 32, threads = 1, repeats = 5, batch = 0, context = 0, verify = 0, bandwidth_mib = 256;
};

constexpr int kMostTokens = 100000000;

const char kUsage[] =
    "usage: pocketforge-run MODEL [--prompt-tokens N] [--decode-tokens N] [--threads N] [--repeats N]\n"
    "                       [--kv f32|f16|int8] [--batch N] [--context N] [--bandwidth-mib N] [--verify 1]\n"
    "       pocketforge-run MODEL --ids 1,2,3 --decode-tokens N    continue these ids greedily\n";

double cpu_now() {
    timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

int fail(const char *text) {
    fprintf(stderr, "error: %s\n", text);
    return 2;
}

// What was printed has arrived, or the status says that it has not.
int flushed() {
    if (fflush(stdout) == 0 && ferror(stdout) == 0) return 0;
    fprintf(stderr, "error: standard output: %s\n", strerror(errno));
    return 1;
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
        const struct { const char *name; const char **value; } texts[] = {{"--ids", &options->ids}, {"--kv", &options->kv}};
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
    return options->model != nullptr ? 0 : fail("MODEL is missing; pocketforge-run --help says how it is called");
}

// The text of a run: "[1.5, 2.5]".
void print_list(const char *name, const pf::Buffer<double> &values, double factor) {
    printf("\"%s\":[", name);
    for (size_t i = 0; i < values.size(); ++i) printf("%s%.9g", i == 0 ? "" : ",", values[i] * factor);
    printf("]");
}

double median(const pf::Buffer<double> &values) {
    pf::Buffer<double> sorted;
    if (!sorted.allocate(values.size())) return 0.0;
    memcpy(sorted.data(), values.data(), values.size() * sizeof(double));
    qsort(sorted.data(), sorted.size(), sizeof(double), [](const void *a, const void *b) {
        double x = *static_cast<const double *>(a), y = *static_cast<const double *>(b);
        return x < y ? -1 : x > y ? 1 : 0;
    });
    size_t middle = sorted.size() / 2;
    return sorted.size() % 2 == 1 ? sorted[middle] : 0.5 * (sorted[middle - 1] + sorted[middle]);
}

// Forget the peak of the calibration's buffer, where the kernel lets a process do so.
void reset_peak() {
    if (FILE *file = fopen("/proc/self/clear_refs", "w")) {
        fputs("5", file);
        fclose(file);
    }
}

// From the kernel's own book where there is one: getrusage also remembers what the process was before it became this program.
int64_t peak_bytes() {
    if (FILE *file = fopen("/proc/self/status", "r")) {
        char line[128];
        long long kib = -1;
        while (kib < 0 && fgets(line, sizeof line, file) != nullptr) {
            if (sscanf(line, "VmHWM: %lld", &kib) != 1) kib = -1;
        }
        fclose(file);
        if (kib >= 0) return int64_t(kib) * 1024;
    }
    rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return int64_t(usage.ru_maxrss) * 1024;
}

int continue_ids(pf_session *session, const pf_model_info &info, int context, const Options &options, char *error, size_t size) {
    pf::Buffer<int32_t> ids;
    pf::Buffer<float> logits;
    size_t most = strlen(options.ids) / 2 + 1;
    if (!ids.allocate(most) || !logits.allocate(size_t(info.vocab_size))) return fail("no memory");
    int count = 0;
    for (const char *p = options.ids;; ++p) {
        long id = 0;
        if (!whole(p, INT32_MAX, ',', &id, &p)) return fail("--ids: expected ids of the vocabulary with commas between");
        ids[size_t(count++)] = int32_t(id);
        if (*p == '\0') break;
    }
    int room = context - count;
    if (options.decode - 1 > room) {
        char text[160];
        snprintf(text, sizeof text, "%d ids and %d that follow do not fit the context of %d", count, options.decode, count + room);
        return fail(text);
    }
    if (pf_session_eval(session, ids.data(), count, 0, logits.data(), error, size) != PF_OK) return fail(error);
    printf("{\"ids\":[");
    uint64_t state = 1;
    for (int i = 0; i < options.decode; ++i) {
        int32_t id = pf_sample(logits.data(), info.vocab_size, 0.0f, 1.0f, &state);
        printf("%s%d", i == 0 ? "" : ",", id);
        if (i + 1 == options.decode) break;
        if (pf_session_eval(session, &id, 1, 0, logits.data(), error, size) != PF_OK) return fail(error);
    }
    printf("],\"logits_crc32c\":\"%08x\"", pf_crc32c(logits.data(), size_t(info.vocab_size) * sizeof(float), 0));
    return 0;
}

// Of a mixture: bytes of routed experts that one prefill and one decoded token took, and who was chosen in all measured passes.
void print_experts(const pf_model_info &info, const pf_session *session, double prefill, double decode) {
    printf(",\"moe\":{\"num_experts\":%d,\"top_k\":%d,\"layers\":%d,\"expert_bytes\":%llu,\"prefill_expert_bytes\":%.0f,", info.num_experts,
           info.top_k, info.moe_layers, static_cast<unsigned long long>(info.expert_bytes), prefill);
    printf("\"decode_expert_bytes_per_token\":%.0f,\"hits\":[", decode);
    size_t experts = size_t(info.num_experts), layers = size_t(info.moe_layers);
    pf::Buffer<uint64_t> hits;
    if (hits.allocate(experts * layers)) pf_session_experts(session, hits.data(), nullptr, nullptr);
    for (size_t i = 0; i < hits.size(); ++i) {
        const char *before = i == 0 ? "[" : i % experts == 0 ? "],[" : ",";
        printf("%s%llu", before, static_cast<unsigned long long>(hits[i]));
    }
    printf("%s]}", hits.size() > 0 ? "]" : "");
}

uint64_t expert_bytes_read(const pf_session *session) {
    uint64_t bytes = 0;
    pf_session_experts(session, nullptr, nullptr, &bytes);
    return bytes;
}

} // namespace

int main(int argc, char **argv) {
    Options options;
    if (argc == 2 && strcmp(argv[1], "--help") == 0) {
        fputs(kUsage, stdout);
        return flushed();
    }
    if (int status = parse(argc, argv, &options)) return status;
    char error[512];
    pf_model *model = nullptr;
    pf_session *session = nullptr;
    double begin = pf::now();
    if (pf_model_open(options.model, -1, options.verify, &model, error, sizeof error) != PF_OK) return fail(error);
    double load_seconds = pf::now() - begin;
    pf_model_info info;
    pf_model_get_info(model, &info);
    int kv = strcmp(options.kv, "f32") == 0 ? PF_KV_F32 : strcmp(options.kv, "int8") == 0 ? PF_KV_INT8 : PF_KV_F16;
    if (kv == PF_KV_F16 && strcmp(options.kv, "f16") != 0) return fail("--kv: expected f32, f16 or int8");
    int needed = options.ids != nullptr ? int(strlen(options.ids) / 2) + 1 + options.decode : options.prompt + options.decode;
    pf_session_options settings = {options.context > 0 ? options.context : pf::smaller(needed, info.max_positions), options.threads, kv,
                                   options.batch};
    if (pf_session_create(model, &settings, &session, error, sizeof error) != PF_OK) return fail(error);
    if (options.ids != nullptr) {
        int status = continue_ids(session, info, settings.context, options, error, sizeof error);
        if (status != 0) return status;
        printf(",\"isa\":\"%s\",\"threads\":%d}\n", pf_model_isa(model), options.threads);
        return flushed();
    }

    pf::Buffer<int32_t> tokens;
    pf::Buffer<float> logits;
    pf::Buffer<double> prefill, decode, steps;
    if (!tokens.allocate(size_t(options.prompt)) || !logits.allocate(size_t(info.vocab_size)) || !prefill.allocate(size_t(options.repeats)) ||
        !decode.allocate(size_t(options.repeats)) || !steps.allocate(size_t(options.repeats) * size_t(options.decode))) {
        return fail("no memory");
    }
    for (int i = 0; i < options.prompt; ++i) tokens[size_t(i)] = int32_t((int64_t(i) * 7919 + 13) % info.vocab_size);
    size_t bytes = size_t(options.bandwidth_mib) << 20;
    double before = bytes > 0 ? pf_read_bandwidth(bytes, options.threads, 3) : 0.0;
    reset_peak();
    double prefill_cpu = 0, decode_cpu = 0, kv_read = 0, experts_read[2] = {}, operations[2][32] = {};
    uint32_t crc = 0;
    uint64_t state = 1;
    int64_t peak = 0;
    for (int r = -1; r < options.repeats; ++r) {  // round -1 warms up and is not counted
        pf_session_reset(session);
        pf_session_clocks(session, r >= 0, nullptr);
        uint64_t read_before = expert_bytes_read(session);
        double start = pf::now(), cpu = cpu_now();
        if (pf_session_eval(session, tokens.data(), options.prompt, 0, logits.data(), error, sizeof error) != PF_OK) return fail(error);
        double end = pf::now();
        uint64_t read_prefill = expert_bytes_read(session);
        if (r >= 0) prefill[size_t(r)] = end - start;
        if (r >= 0) experts_read[0] += double(read_prefill - read_before) / options.repeats;
        if (r >= 0) prefill_cpu += cpu_now() - cpu;
        double parts[32] = {};
        pf_session_clocks(session, r >= 0, parts);
        for (int i = 0; i < pf_operation_count(); ++i) operations[0][i] += parts[i];
        start = end;
        cpu = cpu_now();
        double last = start;
        for (int i = 0; i < options.decode; ++i) {
            int32_t id = pf_sample(logits.data(), info.vocab_size, 0.0f, 1.0f, &state);
            if (r >= 0) kv_read += double(pf_session_kv_read_bytes(session));
            if (pf_session_eval(session, &id, 1, 0, logits.data(), error, sizeof error) != PF_OK) return fail(error);
            end = pf::now();
            if (r >= 0) steps[size_t(r) * size_t(options.decode) + size_t(i)] = end - last;
            last = end;
        }
        if (r >= 0) decode[size_t(r)] = end - start;
        if (r >= 0) decode_cpu += cpu_now() - cpu;
        if (r >= 0) experts_read[1] += double(expert_bytes_read(session) - read_prefill) / options.repeats / options.decode;
        pf_session_clocks(session, 0, parts);
        for (int i = 0; i < pf_operation_count(); ++i) operations[1][i] += parts[i];
        crc = pf_crc32c(logits.data(), size_t(info.vocab_size) * sizeof(float), 0);
        peak = pf::larger(peak, peak_bytes());
    }
    double peak_operations = bytes > 0 ? pf_int8_peak(3) : 0.0;
    double after = bytes > 0 ? pf_read_bandwidth(bytes, options.threads, 3) : 0.0;
    double per_token = median(steps);
    printf("{\"isa\":\"%s\",\"threads\":%d,\"kv\":\"%s\",\"prompt_tokens\":%d,\"decode_tokens\":%d,\"load_seconds\":%.6g,", pf_model_isa(model),
           options.threads, options.kv, options.prompt, options.decode, load_seconds);
    printf("\"prefill_tokens_per_second\":%.6g,\"decode_tokens_per_second\":%.6g,\"time_to_first_token_ms\":%.6g,",
           options.prompt / median(prefill), options.decode / median(decode), 1e3 * median(prefill));
    printf("\"prefill_cpu_seconds\":%.6g,\"decode_cpu_seconds\":%.6g,", prefill_cpu / options.repeats, decode_cpu / options.repeats);
    printf("\"peak_memory_bytes\":%lld,\"weight_bytes\":%llu,\"decode_bytes\":%llu,\"kv_bytes\":%llu,", static_cast<long long>(peak),
           static_cast<unsigned long long>(info.file_bytes), static_cast<unsigned long long>(info.decode_bytes),
           static_cast<unsigned long long>(pf_session_kv_bytes(session)));
    printf("\"read_bandwidth_before\":%.6g,\"read_bandwidth_after\":%.6g,", before, after);
    double best = pf::larger(before, after);
    double products = operations[0][3] + operations[0][6] + operations[0][7] + operations[0][9];  // qkv, out, gate and up, down
    double integer = 2.0 * double(info.layer_weights) * options.prompt * options.repeats;
    printf("\"int8_peak\":%.6g,\"prefill_int8_operations_per_second\":%.6g,", peak_operations, products > 0 ? integer / products : 0.0);
    kv_read /= double(options.repeats) * options.decode;
    printf("\"decode_share_of_bandwidth\":%.4g,", best > 0 ? double(info.decode_bytes) / per_token / best : 0.0);
    printf("\"decode_kv_bytes\":%.0f,\"decode_share_with_cache\":%.4g,", kv_read,
           best > 0 ? (double(info.decode_bytes) + kv_read) / per_token / best : 0.0);
    printf("\"operations\":{");
    for (int phase = 0; phase < 2; ++phase) {
        printf("%s\"%s\":{", phase == 0 ? "" : ",", phase == 0 ? "prefill_ms" : "decode_ms");
        double per = 1e3 / options.repeats / (phase == 0 ? 1 : options.decode);
        for (int i = 0; i < pf_operation_count(); ++i) printf("%s\"%s\":%.6g", i == 0 ? "" : ",", pf_operation_name(i), operations[phase][i] * per);
        printf("}");
    }
    printf("},\"logits_crc32c\":\"%08x\"", crc);
    if (info.moe_layers > 0) print_experts(info, session, experts_read[0], experts_read[1]);
    printf(",\"samples\":{");
    print_list("prefill_seconds", prefill, 1.0);
    printf(",");
    print_list("decode_step_seconds", steps, 1.0);
    printf("}}\n");
    pf_session_free(session);
    pf_model_close(model);
    return flushed();
}
