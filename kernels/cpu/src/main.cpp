// pocketforge-run: measures a packed model, or continues token ids. Prints one JSON object; needs nothing but the model.
#include <sys/resource.h>
#include <time.h>

#include "common.h"

namespace {

struct Options {
    const char *model = nullptr, *ids = nullptr, *kv = "f16";
    int prompt = 128, decode = 32, threads = 1, repeats = 5, batch = 0, context = 0, verify = 0;
    long bandwidth_mib = 256;
};

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

bool parse(int argc, char **argv, Options *options) {
    for (int i = 1; i < argc; ++i) {
        const char *name = argv[i];
        if (strncmp(name, "--", 2) != 0) {
            if (options->model != nullptr) return false;
            options->model = name;
            continue;
        }
        if (++i >= argc) return false;
        struct { const char *name; int *value; } numbers[] = {
            {"--prompt-tokens", &options->prompt}, {"--decode-tokens", &options->decode}, {"--threads", &options->threads},
            {"--repeats", &options->repeats}, {"--batch", &options->batch}, {"--context", &options->context},
            {"--verify", &options->verify},
        };
        bool known = false;
        for (auto &number : numbers) {
            if (strcmp(name, number.name) != 0) continue;
            char *end = nullptr;
            long value = strtol(argv[i], &end, 10);
            if (end == argv[i] || *end != '\0' || value < 0 || value > 100000000) return false;
            *number.value = int(value);
            known = true;
        }
        if (strcmp(name, "--bandwidth-mib") == 0) {
            options->bandwidth_mib = strtol(argv[i], nullptr, 10);
            known = options->bandwidth_mib >= 0 && options->bandwidth_mib <= 65536;
        }
        if (strcmp(name, "--ids") == 0) options->ids = argv[i], known = true;
        if (strcmp(name, "--kv") == 0) options->kv = argv[i], known = true;
        if (!known) return false;
    }
    return options->model != nullptr && options->repeats >= 1;
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

int continue_ids(pf_session *session, const pf_model_info &info, const Options &options, char *error, size_t size) {
    pf::Buffer<int32_t> ids;
    pf::Buffer<float> logits;
    size_t most = strlen(options.ids) / 2 + 1;
    if (!ids.allocate(most) || !logits.allocate(size_t(info.vocab_size))) return fail("no memory");
    int count = 0;
    for (const char *p = options.ids; *p != '\0';) {
        char *end = nullptr;
        ids[size_t(count++)] = int32_t(strtol(p, &end, 10));
        if (end == p || (*end != ',' && *end != '\0')) return fail("--ids: expected whole numbers with commas between");
        p = *end == ',' ? end + 1 : end;
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

} // namespace

int main(int argc, char **argv) {
    Options options;
    if (!parse(argc, argv, &options)) {
        fputs(kUsage, stderr);
        return 2;
    }
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
        int status = continue_ids(session, info, options, error, sizeof error);
        if (status == 0) printf(",\"isa\":\"%s\",\"threads\":%d}\n", pf_model_isa(model), options.threads);
        return status;
    }
    if (options.prompt < 1 || options.decode < 1) return fail("--prompt-tokens and --decode-tokens must be at least 1");

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
    double prefill_cpu = 0, decode_cpu = 0, kv_read = 0, operations[2][32] = {};
    uint32_t crc = 0;
    uint64_t state = 1;
    int64_t peak = 0;
    for (int r = -1; r < options.repeats; ++r) {  // round -1 warms up and is not counted
        pf_session_reset(session);
        pf_session_clocks(session, r >= 0, nullptr);
        double start = pf::now(), cpu = cpu_now();
        if (pf_session_eval(session, tokens.data(), options.prompt, 0, logits.data(), error, sizeof error) != PF_OK) return fail(error);
        double end = pf::now();
        if (r >= 0) prefill[size_t(r)] = end - start;
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
    printf("},\"logits_crc32c\":\"%08x\",\"samples\":{", crc);
    print_list("prefill_seconds", prefill, 1.0);
    printf(",");
    print_list("decode_step_seconds", steps, 1.0);
    printf("}}\n");
    pf_session_free(session);
    pf_model_close(model);
    return 0;
}
