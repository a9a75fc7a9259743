// A packed file in memory: checked from the first byte to the last before anything is read from it. Format: docs/packed-format.md.
#pragma once

#include "json.h"
#include "ops.h"

namespace pf {

struct Header {
    char magic[8];            // "PKTFORGE"
    uint32_t version;         // 1
    uint32_t byte_order;      // 0x01020304 as the machine that wrote it stores it: little-endian
    uint64_t file_bytes;
    uint64_t metadata_offset, metadata_bytes;
    uint64_t data_offset;     // tensors lie from here to the end
    uint32_t metadata_crc32c;
    uint32_t reserved;        // 0
    uint32_t unused;          // 0
    uint32_t header_crc32c;   // of the 60 bytes before it
};
static_assert(sizeof(Header) == 64, "the header is 64 bytes");

struct Tensor {
    enum Encoding : uint8_t { kInt4, kInt8, kF32, kBytes } encoding;
    char name[64];
    uint32_t rows, columns;   // a vector is one row; bytes have one row
    uint64_t offset, bytes;
    uint32_t crc32c;
};

class PackedFile {
  public:
    ~PackedFile();
    pf_status open(const char *path, bool verify, const Error &error);
    // The same checks on bytes that somebody else keeps.
    pf_status open(const uint8_t *bytes, size_t size, bool verify, const Error &error);

    const Json &json() const { return json_; }
    const char *metadata() const { return reinterpret_cast<const char *>(bytes_ + header_.metadata_offset); }
    size_t metadata_bytes() const { return size_t(header_.metadata_bytes); }
    size_t size() const { return size_; }
    size_t tensors() const { return count_; }
    const Tensor *find(const char *name) const;
    const uint8_t *data(const Tensor &tensor) const { return bytes_ + tensor.offset; }

  private:
    pf_status check(bool verify, const Error &error);
    pf_status read_tensors(const Error &error);
    pf_status read_tensor(int node, Tensor *tensor, const Error &error) const;

    const uint8_t *bytes_ = nullptr;
    size_t size_ = 0;
    bool mapped_ = false;
    Header header_ = {};
    Json json_;
    Buffer<Tensor> tensors_;          // sorted by offset
    Buffer<const Tensor *> by_name_;  // of equal names, the first in the file
    size_t count_ = 0;
};

} // namespace pf
