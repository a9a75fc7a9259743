// A packed file from a stranger: bytes in, no crash out. One entry for libFuzzer (POCKETFORGE_FUZZ) and, as a program of its own
// (pocketforge-replay), for files on the command line.
//
// Checksums would stop a mutated file at once, so they are put right first: what is behind them is tested. What loads and is
// small also computes a few tokens.
#include "../src/session.h"

namespace {

void mend_checksums(uint8_t *bytes, size_t size) {
    if (size < sizeof(pf::Header)) return;
    pf::Header header;
    memcpy(&header, bytes, sizeof header);
    if (header.metadata_offset <= size && header.metadata_bytes <= size - header.metadata_offset) {
        header.metadata_crc32c = pf_crc32c(bytes + header.metadata_offset, size_t(header.metadata_bytes), 0);
        memcpy(bytes, &header, sizeof header);
    }
    header.header_crc32c = pf_crc32c(bytes, 60, 0);
    memcpy(bytes, &header, sizeof header);
}

bool small(const pf::Config &c) {
    return c.vocab_size <= 4096 && c.hidden_size <= 512 && c.widest_ffn() <= 1024 && c.router.experts <= 64 && c.executed() <= 8 && c.query_size() <= 1024;
}

int try_bytes(const uint8_t *data, size_t size) {
    pf::Buffer<uint8_t> copy;
    if (!copy.allocate(size)) return 0;
    memcpy(copy.data(), data, size);
    mend_checksums(copy.data(), size);
    char text[256];
    pf::Error error(text, sizeof text);
    pf_model model;
    model.ops = pf::default_ops();
    if (model.file.open(copy.data(), size, false, error) != PF_OK || model.read(error) != PF_OK) return text[0] == '\0' ? -1 : 1;
    if (!small(model.config)) return 2;
    for (int kv = PF_KV_F32; kv <= PF_KV_INT8; ++kv) {
        pf_session session;
        session.model = &model;
        session.options = {pf::smaller(model.config.max_positions, 40), 1, kv, 8};
        if (session.create(error) != PF_OK) return 3;
        int32_t tokens[3] = {0, model.config.vocab_size / 2, model.config.vocab_size - 1};
        pf::Buffer<float> logits;
        if (!logits.allocate(size_t(model.config.vocab_size))) return 3;
        int count = pf::smaller(3, session.options.context);
        session.eval(tokens, nullptr, count, false, logits.data(), nullptr, error);
        uint64_t state = 1;
        pf_sample(logits.data(), model.config.vocab_size, 1.0f, 0.9f, &state);
    }
    return 0;
}

} // namespace

#if defined(POCKETFORGE_FUZZ)
extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    // An error without a text would be one that a user cannot act on.
    if (try_bytes(data, size) < 0) __builtin_trap();
    return 0;
}
#else
int main(int argc, char **argv) {
    int counts[5] = {};
    for (int i = 1; i < argc; ++i) {
        FILE *file = fopen(argv[i], "rb");
        if (file == nullptr) return 2;
        fseek(file, 0, SEEK_END);
        long size = ftell(file);
        rewind(file);
        pf::Buffer<uint8_t> bytes;
        if (size < 0 || !bytes.allocate(size_t(size)) || fread(bytes.data(), 1, size_t(size), file) != size_t(size)) return 2;
        fclose(file);
        ++counts[try_bytes(bytes.data(), size_t(size)) + 1];
    }
    printf("{\"silent\":%d,\"computed\":%d,\"refused\":%d,\"large\":%d,\"no_session\":%d}\n", counts[0], counts[1], counts[2], counts[3],
           counts[4]);
    return counts[0] == 0 ? 0 : 1;
}
#endif
