#include "packed_file.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace pf {

namespace {
constexpr uint64_t kMostRows = 1u << 24, kMostColumns = 1u << 20, kMostMetadata = 64u << 20, kMostTensors = 1u << 16;
} // namespace

PackedFile::~PackedFile() {
    if (mapped_) munmap(const_cast<uint8_t *>(bytes_), size_);
}

pf_status PackedFile::open(const char *path, bool verify, const Error &error) {
    int file = ::open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe that nobody writes to must not hold us up
    if (file < 0) return error.set(PF_IO, "%s: %s", path, strerror(errno));
    struct stat about;
    if (fstat(file, &about) != 0 || !S_ISREG(about.st_mode)) {
        close(file);
        return error.set(PF_IO, "%s: not a regular file; expected a packed model", path);
    }
    size_t size = size_t(about.st_size);
    if (size < sizeof(Header)) {
        close(file);
        return error.set(PF_BAD_FILE, "the file has %zu bytes; expected a header of 64", size);
    }
    int flags = MAP_PRIVATE;
#ifdef MAP_POPULATE
    flags |= MAP_POPULATE;  // one pass over the page tables instead of a fault for every few pages
#endif
    void *memory = mmap(nullptr, size, PROT_READ, flags, file, 0);
    int problem = errno;
    close(file);
    if (memory == MAP_FAILED) return error.set(PF_IO, "%s: cannot be mapped: %s", path, strerror(problem));
    mapped_ = true;
    bytes_ = static_cast<const uint8_t *>(memory);
    size_ = size;
    return check(verify, error);
}

pf_status PackedFile::open(const uint8_t *bytes, size_t size, bool verify, const Error &error) {
    bytes_ = bytes;
    size_ = size;
    if (size < sizeof(Header)) return error.set(PF_BAD_FILE, "the file has %zu bytes; expected a header of 64", size);
    return check(verify, error);
}

pf_status PackedFile::check(bool verify, const Error &error) {
    memcpy(&header_, bytes_, sizeof header_);
    const Header &h = header_;
    if (memcmp(h.magic, "PKTFORGE", 8) != 0) return error.set(PF_BAD_FILE, "magic: not a packed model");
    if (h.byte_order == 0x04030201u) return error.set(PF_BAD_FILE, "byte_order: big-endian; expected little-endian");
    if (h.byte_order != 0x01020304u) return error.set(PF_BAD_FILE, "byte_order: %08x; expected 01020304", h.byte_order);
    if (h.version != 1) return error.set(PF_BAD_FILE, "version: %u; this runtime reads version 1", h.version);
    if (pf_crc32c(bytes_, 60, 0) != h.header_crc32c) return error.set(PF_BAD_FILE, "header_crc32c: the header is damaged");
    if (h.file_bytes != size_) {
        return error.set(PF_BAD_FILE, "file_bytes: the header says %llu, the file has %zu; it was cut or has grown",
                         static_cast<unsigned long long>(h.file_bytes), size_);
    }
    if (h.metadata_offset < sizeof(Header) || h.metadata_bytes > kMostMetadata || h.metadata_offset > size_ ||
        h.metadata_bytes > size_ - h.metadata_offset) {
        return error.set(PF_BAD_FILE, "metadata_bytes: the metadata does not lie inside the file");
    }
    if (h.data_offset % kAlignment != 0 || h.data_offset > size_ || h.data_offset < h.metadata_offset + h.metadata_bytes) {
        return error.set(PF_BAD_FILE, "data_offset: not a multiple of 64 between the metadata and the end of the file");
    }
    if (pf_crc32c(metadata(), metadata_bytes(), 0) != h.metadata_crc32c) {
        return error.set(PF_BAD_FILE, "metadata_crc32c: the metadata is damaged");
    }
    size_t at = 0;
    if (!json_.parse(metadata(), metadata_bytes(), &at)) {
        return error.set(PF_BAD_FILE, "metadata: not valid JSON at byte %zu", at);
    }
    pf_status status = read_tensors(error);
    if (status != PF_OK || !verify) return status;
    for (size_t i = 0; i < count_; ++i) {
        if (pf_crc32c(data(tensors_[i]), size_t(tensors_[i].bytes), 0) != tensors_[i].crc32c) {
            return error.set(PF_BAD_FILE, "tensor %s: its checksum does not match, it is damaged", tensors_[i].name);
        }
    }
    return PF_OK;
}

pf_status PackedFile::read_tensors(const Error &error) {
    int list = json_.find(0, "tensors");
    if (!json_.is(list, Json::kArray)) return error.set(PF_BAD_FILE, "tensors: missing from the metadata");
    size_t count = size_t(json_.size(list));
    if (count == 0 || count > kMostTensors) return error.set(PF_BAD_FILE, "tensors: %zu of them; expected 1 to 65536", count);
    if (!tensors_.allocate(count)) return error.set(PF_NO_MEMORY, "no memory for the list of %zu tensors", count);
    int node = json_.first(list);
    for (count_ = 0; count_ < count; ++count_, node = json_.after(node)) {
        pf_status status = read_tensor(node, &tensors_[count_], error);
        if (status != PF_OK) return status;
    }
    qsort(tensors_.data(), count_, sizeof(Tensor), [](const void *a, const void *b) {
        uint64_t x = static_cast<const Tensor *>(a)->offset, y = static_cast<const Tensor *>(b)->offset;
        return x < y ? -1 : x > y ? 1 : 0;
    });
    for (size_t i = 1; i < count_; ++i) {
        const Tensor &before = tensors_[i - 1], &tensor = tensors_[i];
        if (tensor.offset < before.offset + before.bytes) {
            return error.set(PF_BAD_FILE, "tensor %s: offset: it overlaps tensor %s", tensor.name, before.name);
        }
    }
    if (!by_name_.allocate(count)) return error.set(PF_NO_MEMORY, "no memory for the list of %zu tensors", count);
    for (size_t i = 0; i < count; ++i) by_name_[i] = &tensors_[i];
    qsort(by_name_.data(), count, sizeof(const Tensor *), [](const void *a, const void *b) {
        const Tensor *x = *static_cast<const Tensor *const *>(a), *y = *static_cast<const Tensor *const *>(b);
        int order = strcmp(x->name, y->name);
        return order != 0 ? order : x < y ? -1 : 1;
    });
    return PF_OK;
}

pf_status PackedFile::read_tensor(int node, Tensor *tensor, const Error &error) const {
    *tensor = {};
    json_.copy(json_.find(node, "name"), tensor->name, sizeof tensor->name);
    for (char *c = tensor->name; *c != '\0'; ++c) {  // it goes into messages
        if (*c < 0x21 || *c > 0x7e || *c == '\\') *c = '?';
    }
    if (tensor->name[0] == '\0') return error.set(PF_BAD_FILE, "tensors: one has no name");
    int encoding = json_.find(node, "encoding");
    if (json_.equals(encoding, "int4_g32")) tensor->encoding = Tensor::kInt4;
    else if (json_.equals(encoding, "int8_row")) tensor->encoding = Tensor::kInt8;
    else if (json_.equals(encoding, "f32")) tensor->encoding = Tensor::kF32;
    else if (json_.equals(encoding, "bytes")) tensor->encoding = Tensor::kBytes;
    else return error.set(PF_BAD_FILE, "tensor %s: encoding: not one that this runtime reads", tensor->name);
    int shape = json_.find(node, "shape");
    int second = json_.first(shape);
    uint64_t rows = 1, columns = 0, crc = 0;
    bool good = json_.size(shape) == 1 || json_.size(shape) == 2;
    if (good && json_.size(shape) == 2) {
        good = json_.integer(second, &rows);
        second = json_.after(second);
    }
    good = good && json_.integer(second, &columns);
    uint64_t widest = tensor->encoding == Tensor::kBytes ? UINT32_MAX : larger(kMostColumns, kMostRows);
    if (!good || rows == 0 || rows > kMostRows || columns == 0 || columns > widest) {
        return error.set(PF_BAD_FILE, "tensor %s: shape: not one or two sizes from 1 to 2^24", tensor->name);
    }
    tensor->rows = uint32_t(rows);
    tensor->columns = uint32_t(columns);
    if (!json_.integer(json_.find(node, "offset"), &tensor->offset) || !json_.integer(json_.find(node, "bytes"), &tensor->bytes) ||
        !json_.integer(json_.find(node, "crc32c"), &crc) || crc > UINT32_MAX) {
        return error.set(PF_BAD_FILE, "tensor %s: offset, bytes or crc32c is missing or no whole number", tensor->name);
    }
    tensor->crc32c = uint32_t(crc);
    if (tensor->offset % kAlignment != 0 || tensor->offset < header_.data_offset || tensor->offset > size_ ||
        tensor->bytes > size_ - tensor->offset) {
        return error.set(PF_BAD_FILE, "tensor %s: offset: not a multiple of 64 inside the file", tensor->name);
    }
    uint64_t expected = rows * columns * (tensor->encoding == Tensor::kF32 ? 4 : 1);
    if (tensor->encoding == Tensor::kInt4 || tensor->encoding == Tensor::kInt8) {
        if (columns % kGroup != 0 || columns > kMostColumns) {
            return error.set(PF_BAD_FILE, "tensor %s: shape: rows of %llu weights; expected a multiple of 32", tensor->name,
                             static_cast<unsigned long long>(columns));
        }
        Matrix matrix;
        matrix.encoding = tensor->encoding == Tensor::kInt4 ? Matrix::kInt4 : Matrix::kInt8;
        matrix.rows = int(rows);
        matrix.k = int(columns);
        expected = matrix.bytes();
    }
    if (tensor->bytes != expected) {
        return error.set(PF_BAD_FILE, "tensor %s: bytes: %llu; its shape needs %llu", tensor->name,
                         static_cast<unsigned long long>(tensor->bytes), static_cast<unsigned long long>(expected));
    }
    return PF_OK;
}

const Tensor *PackedFile::find(const char *name) const {
    size_t begin = 0, end = count_;
    while (begin < end) {
        size_t middle = (begin + end) / 2;
        if (strcmp(by_name_[middle]->name, name) < 0) begin = middle + 1;
        else end = middle;
    }
    return begin < count_ && strcmp(by_name_[begin]->name, name) == 0 ? by_name_[begin] : nullptr;
}

} // namespace pf
