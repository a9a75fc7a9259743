// A strict, small JSON reader for the metadata of a packed file: untrusted text in, a flat array of nodes out.
#pragma once

#include "common.h"

namespace pf {

class Json {
  public:
    enum Type : uint8_t { kNull, kFalse, kTrue, kNumber, kString, kArray, kObject };
    struct Node {
        Type type;
        uint32_t begin, end;  // of its text; a string's without the quotes, escapes as they stand
        uint32_t next;        // index of what follows the whole value
        uint32_t size;        // members of an array, pairs of an object
    };

    ~Json() { free(nodes_); }
    // False where the text is not one JSON value, is nested more than 16 deep or has more than a million nodes; `at` then
    // says where it stopped.
    bool parse(const char *text, size_t size, size_t *at);

    // Nodes are named by index; the root is 0, and -1 stands for what is not there.
    int find(int object, const char *key) const;
    int first(int array) const { return is(array, kArray) && nodes_[array].size > 0 ? array + 1 : -1; }
    int after(int node) const { return int(nodes_[node].next); }
    int size(int node) const { return node < 0 ? 0 : int(nodes_[node].size); }
    bool is(int node, Type type) const { return node >= 0 && nodes_[node].type == type; }
    bool equals(int node, const char *text) const;  // a string without escapes
    bool integer(int node, uint64_t *value) const;  // a whole number, 0..2^53
    bool number(int node, double *value) const;
    // The text of a string; cut to fit.
    void copy(int node, char *out, size_t size) const;

  private:
    bool value(int depth);
    bool members(Type type, char closing, int depth);
    bool string();
    bool literal(const char *word, Type type);
    bool digits();
    bool numeral();
    void space();
    int add(Type type, size_t begin);
    char peek() const { return at_ < size_ ? text_[at_] : '\0'; }
    bool take(char c);

    const char *text_ = nullptr;
    size_t size_ = 0, at_ = 0;
    Node *nodes_ = nullptr;
    size_t count_ = 0, capacity_ = 0;
};

} // namespace pf
