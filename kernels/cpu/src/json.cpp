#include "json.h"

namespace pf {

namespace {
constexpr int kDeepest = 16;
constexpr size_t kMostNodes = 1u << 20;
} // namespace

bool Json::parse(const char *text, size_t size, size_t *at) {
    text_ = text;
    size_ = size < UINT32_MAX ? size : 0;
    at_ = count_ = 0;
    bool good = value(0);
    space();
    *at = at_;
    return good && at_ == size_;
}

void Json::space() {
    while (at_ < size_ && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t')) ++at_;
}

bool Json::take(char c) {
    space();
    if (peek() != c || at_ >= size_) return false;
    ++at_;
    return true;
}

int Json::add(Type type, size_t begin) {
    if (count_ == capacity_) {
        size_t capacity = larger<size_t>(256, capacity_ * 2);
        if (capacity > kMostNodes) return -1;
        Node *grown = static_cast<Node *>(realloc(nodes_, capacity * sizeof(Node)));
        if (grown == nullptr) return -1;
        nodes_ = grown;
        capacity_ = capacity;
    }
    nodes_[count_] = {type, uint32_t(begin), 0, 0, 0};
    return int(count_++);
}

bool Json::value(int depth) {
    space();
    switch (peek()) {
    case '{': return members(kObject, '}', depth);
    case '[': return members(kArray, ']', depth);
    case '"': return string();
    case 't': return literal("true", kTrue);
    case 'f': return literal("false", kFalse);
    case 'n': return literal("null", kNull);
    default: return numeral();
    }
}

bool Json::members(Type type, char closing, int depth) {
    int node = add(type, at_++);
    if (node < 0 || depth >= kDeepest) return false;
    uint32_t count = 0;
    if (!take(closing)) {
        do {
            space();
            if (type == kObject && (peek() != '"' || !string() || !take(':'))) return false;
            if (!value(depth + 1)) return false;
            ++count;
        } while (take(','));
        if (!take(closing)) return false;
    }
    nodes_[node].end = uint32_t(at_);
    nodes_[node].next = uint32_t(count_);
    nodes_[node].size = count;
    return true;
}

bool Json::string() {
    int node = add(kString, ++at_);
    if (node < 0) return false;
    for (; at_ < size_ && text_[at_] != '"'; ++at_) {
        if (static_cast<unsigned char>(text_[at_]) < 0x20) return false;
        if (text_[at_] == '\\' && ++at_ >= size_) return false;
    }
    if (at_ >= size_) return false;
    nodes_[node].end = uint32_t(at_++);
    nodes_[node].next = uint32_t(count_);
    return true;
}

bool Json::literal(const char *word, Type type) {
    size_t length = strlen(word);
    if (size_ - at_ < length || memcmp(text_ + at_, word, length) != 0) return false;
    int node = add(type, at_);
    if (node < 0) return false;
    at_ += length;
    nodes_[node].end = uint32_t(at_);
    nodes_[node].next = uint32_t(count_);
    return true;
}

bool Json::digits() {
    size_t begin = at_;
    while (peek() >= '0' && peek() <= '9') ++at_;
    return at_ > begin;
}

bool Json::numeral() {
    int node = add(kNumber, at_);
    if (node < 0) return false;
    if (peek() == '-') ++at_;
    if (!digits()) return false;
    if (peek() == '.') {
        ++at_;
        if (!digits()) return false;
    }
    if (peek() == 'e' || peek() == 'E') {
        ++at_;
        if (peek() == '+' || peek() == '-') ++at_;
        if (!digits()) return false;
    }
    nodes_[node].end = uint32_t(at_);
    nodes_[node].next = uint32_t(count_);
    return true;
}

int Json::find(int object, const char *key) const {
    if (!is(object, kObject)) return -1;
    int node = object + 1;
    for (uint32_t i = 0; i < nodes_[object].size; ++i) {
        int member = after(node);
        if (equals(node, key)) return member;
        node = after(member);
    }
    return -1;
}

bool Json::equals(int node, const char *text) const {
    if (!is(node, kString)) return false;
    size_t length = nodes_[node].end - nodes_[node].begin;
    return strlen(text) == length && memcmp(text_ + nodes_[node].begin, text, length) == 0;
}

bool Json::integer(int node, uint64_t *value) const {
    if (!is(node, kNumber)) return false;
    uint64_t result = 0;
    for (uint32_t i = nodes_[node].begin; i < nodes_[node].end; ++i) {
        if (text_[i] < '0' || text_[i] > '9') return false;
        result = result * 10 + uint64_t(text_[i] - '0');
        if (result > (uint64_t(1) << 53)) return false;
    }
    *value = result;
    return true;
}

bool Json::number(int node, double *value) const {
    if (!is(node, kNumber)) return false;
    // A mantissa of up to 15 digits times a power of ten up to 22 is correctly rounded; that is all a config needs.
    double mantissa = 0;
    int exponent = 0, places = 0, written = 0;
    bool point = false, negative = false, negative_exponent = false, in_exponent = false;
    for (uint32_t i = nodes_[node].begin; i < nodes_[node].end; ++i) {
        char c = text_[i];
        if (c == '-') (in_exponent ? negative_exponent : negative) = true;
        else if (c == '.') point = true;
        else if (c == 'e' || c == 'E') in_exponent = true;
        else if (c >= '0' && c <= '9') {
            if (in_exponent) written = smaller(written * 10 + (c - '0'), 10000);
            else if (mantissa < 1e15) {
                mantissa = mantissa * 10 + (c - '0');
                places += point;
            } else {
                exponent += !point;
            }
        }
    }
    exponent += (negative_exponent ? -written : written) - places;
    double power = 1;
    for (int i = 0, n = smaller(exponent < 0 ? -exponent : exponent, 400); i < n; ++i) power *= 10;
    double result = exponent < 0 ? mantissa / power : mantissa * power;
    *value = negative ? -result : result;
    return true;
}

void Json::copy(int node, char *out, size_t size) const {
    size_t length = is(node, kString) ? smaller<size_t>(nodes_[node].end - nodes_[node].begin, size - 1) : 0;
    memcpy(out, text_ + (length > 0 ? nodes_[node].begin : 0), length);
    out[length] = '\0';
}

} // namespace pf
