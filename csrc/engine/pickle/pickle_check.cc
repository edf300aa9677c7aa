// SPDX-License-Identifier: Apache-2.0
#include "engine/pickle/pickle_check.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/pickle/pickle_parts.h"

namespace ckpt_fast {

namespace {

class PickleChecker {
 public:
  PickleChecker(const uint8_t* data, size_t nbytes, PickleReader reader)
      : data_(data),
        nbytes_(nbytes),
        metadata_(reader == PickleReader::kMetadata),
        limit_(kWeightPerByte * nbytes + kFreeWeight),
        values_(1, Value(Kind::kPlain)) {
    // About as many as metadata contains: growing in steps would touch twice the memory.
    values_.reserve(nbytes / 8);
    memo_.reserve(nbytes / 12);
  }

  size_t run();

 private:
  [[noreturn]] void fail(const std::string& reason) const;
  void read_argument();
  uint64_t number(uint64_t width);
  uint64_t take(uint64_t nbytes);
  void make();
  void combine();

  void push_text(Kind kind);
  void push_global(const std::string& module, const std::string& name);
  std::string line();
  std::string popped_text();
  void put(uint64_t index);
  void get(uint64_t index);
  void tuple(size_t first);
  void frozen_set(size_t first);
  void extend(Kind kind, size_t first);
  void count_keys(size_t first, size_t step);
  void call(Kind made);
  void call_with_names();
  void build();
  void persistent();

  size_t fence() const { return marks_.empty() ? 0 : marks_.back(); }
  uint32_t top() const;
  uint32_t pop();
  size_t last(size_t count) const;
  size_t pop_mark();
  void push(const Value& value);
  void include(Value* whole, uint32_t part);

  const uint8_t* const data_;
  const size_t nbytes_;
  const bool metadata_;
  const uint64_t limit_;
  size_t start_ = 0;  // of the opcode
  size_t position_ = 0;
  uint8_t opcode_ = 0;
  uint64_t argument_ = 0;        // a number, or the length of the bytes that
  uint64_t argument_begin_ = 0;  // begin here
  std::vector<Value> values_;    // the first represents all values about which nothing more need be known
  std::vector<uint32_t> stack_;
  std::vector<size_t> marks_;
  std::vector<uint32_t> memo_;
  uint64_t memo_count_ = 0;
  uint64_t keys_ = 0;
  uint64_t comparisons_ = 0;
};

void PickleChecker::fail(const std::string& reason) const {
  char opcode[32];
  std::snprintf(opcode, sizeof opcode, "opcode 0x%02x at ", opcode_);
  throw std::invalid_argument(opcode + std::to_string(start_) + ": " + reason);
}

size_t PickleChecker::run() {
  if (nbytes_ > kLargestPickle) fail("the pickle is longer than any metadata");
  if (nbytes_ < 2 || data_[0] != 0x80 || data_[1] < 2 || data_[1] > 5) {
    fail("a pickle of protocol 2 to 5 does not begin like this");
  }
  position_ = 2;
  while (true) {
    if (position_ == nbytes_) fail("the pickle has no end");
    start_ = position_;
    opcode_ = data_[position_++];
    read_argument();
    if (opcode_ == '.') {
      if (stack_.size() != 1 || !marks_.empty()) fail("not one value is left");
      return position_;
    }
    if (opcode_ < 0x80) {
      make();
    } else {
      combine();
    }
  }
}

void PickleChecker::read_argument() {
  static const ArgumentTable arguments;
  const Argument argument = arguments.of[opcode_];
  if (argument.width < 0) fail("plain data has no use for it");
  if (metadata_ && !argument.in_metadata) fail("metadata has no use for it");
  if (argument.width == 0) return;
  argument_ = number(static_cast<uint64_t>(argument.width));
  if (argument.counted) argument_begin_ = take(argument_);
}

/// A little-endian number.
uint64_t PickleChecker::number(uint64_t width) {
  const uint64_t begin = take(width);
  uint64_t value = 0;
  for (uint64_t i = 0; i < width; ++i) value |= static_cast<uint64_t>(data_[begin + i]) << (8 * i);
  return value;
}

/// Skips bytes; returns where they begin.
uint64_t PickleChecker::take(uint64_t nbytes) {
  if (nbytes > nbytes_ - position_) fail("its argument ends behind the last byte");
  position_ += nbytes;
  return position_ - nbytes;
}

/// The opcodes of protocols 0 and 1, which are letters.
void PickleChecker::make() {
  switch (opcode_) {
    case '(':
      return marks_.push_back(stack_.size());
    case ')':
      return tuple(stack_.size());
    case 'B':
    case 'C':
      return push_text(Kind::kBytes);
    case 'Q':
      return persistent();
    case 'R':
      return call(Kind::kMade);
    case 'T':
    case 'U':
    case 'X':
      return push_text(Kind::kText);
    case ']':
      return push(Value(Kind::kList));
    case 'a':
      return extend(Kind::kList, last(1));
    case 'b':
      return build();
    case 'c': {
      const std::string module = line();
      return push_global(module, line());
    }
    case 'e':
      return extend(Kind::kList, pop_mark());
    case 'h':
    case 'j':
      return get(argument_);
    case 'q':
    case 'r':
      return put(argument_);
    case 's':
      return extend(Kind::kDict, last(2));
    case 't':
      return tuple(pop_mark());
    case 'u':
      return extend(Kind::kDict, pop_mark());
    case '}':
      return push(Value(Kind::kDict));
    default:
      stack_.push_back(0);
  }
}

/// The opcodes of later protocols.
void PickleChecker::combine() {
  switch (opcode_) {
    case 0x81:
      return call(Kind::kNew);
    case 0x85:
    case 0x86:
    case 0x87:
      return tuple(last(opcode_ - 0x84u));
    case 0x8A:
      if (metadata_ && argument_ > kLongestInteger) fail("it is longer than any integer in metadata");
      return stack_.push_back(0);
    case 0x8C:
    case 0x8D:
      return push_text(Kind::kText);
    case 0x8E:
    case 0x96:
      return push_text(Kind::kBytes);
    case 0x8F:
      return push(Value(Kind::kSet));
    case 0x90:
      return extend(Kind::kSet, pop_mark());
    case 0x91:
      return frozen_set(pop_mark());
    case 0x92:
      return call_with_names();
    case 0x93: {
      const std::string name = popped_text();
      return push_global(popped_text(), name);
    }
    case 0x94:
      return put(memo_count_);
    case 0x95:
      if (argument_ > nbytes_ - position_) fail("its frame ends behind the last byte");
      return;
    default:
      stack_.push_back(0);
  }
}

void PickleChecker::push_text(Kind kind) {
  Value value(kind);
  value.begin = static_cast<uint32_t>(argument_begin_);
  value.nbytes = static_cast<uint32_t>(argument_);
  value.weight += argument_ / kTextPerWeight;
  push(value);
}

void PickleChecker::push_global(const std::string& module, const std::string& name) {
  Value value(Kind::kGlobal);
  value.makes = makes_when_called(module, name);
  push(value);
}

std::string PickleChecker::line() {
  const uint8_t* const begin = data_ + position_;
  const void* const end = std::memchr(begin, '\n', nbytes_ - position_);
  if (end == nullptr) fail("its argument ends behind the last byte");
  if (static_cast<const uint8_t*>(end) - begin > kLongestName) fail("a name is too long");
  const std::string text(begin, static_cast<const uint8_t*>(end));
  position_ += text.size() + 1;
  return text;
}

std::string PickleChecker::popped_text() {
  const Value& value = values_[pop()];
  if (value.kind != Kind::kText) fail("a name is no text");
  if (value.nbytes > kLongestName) fail("a name is too long");
  return std::string(data_ + value.begin, data_ + value.begin + value.nbytes);
}

/// The unpickler's table is as long as the largest index.
void PickleChecker::put(uint64_t index) {
  if (index >= start_) fail("the memo has no place " + std::to_string(index) + " yet");
  const uint32_t value = top();
  if (memo_.size() < index) memo_.resize(index, kEmpty);
  if (memo_.size() == index) memo_.push_back(kEmpty);
  if (memo_[index] == kEmpty) ++memo_count_;
  memo_[index] = value;
}

void PickleChecker::get(uint64_t index) {
  if (index >= memo_.size() || memo_[index] == kEmpty) fail("the memo has no " + std::to_string(index));
  stack_.push_back(memo_[index]);
}

void PickleChecker::tuple(size_t first) {
  Value value(Kind::kTuple);
  for (size_t i = first; i < stack_.size(); ++i) {
    const Kind kind = values_[stack_[i]].kind;
    value.has_number |= !is_sized(kind);
    value.has_range |= kind == Kind::kRange;
    include(&value, stack_[i]);
  }
  stack_.resize(first);
  push(value);
}

void PickleChecker::frozen_set(size_t first) {
  count_keys(first, 1);
  Value value(Kind::kPlain);
  for (size_t i = first; i < stack_.size(); ++i) include(&value, stack_[i]);
  stack_.resize(first);
  push(value);
}

/// Puts the stack's values from `first` on into the one below them.
void PickleChecker::extend(Kind kind, size_t first) {
  if (first <= fence()) fail("the stack is too short");
  if (kind == Kind::kDict && (stack_.size() - first) % 2 != 0) fail("a key has no value");
  const uint32_t target = stack_[first - 1];
  const Kind found = values_[target].kind;
  if (found != kind && found != Kind::kMade && found != Kind::kNew)
    fail("what it adds to does not hold items");
  if (kind != Kind::kList) count_keys(first, kind == Kind::kDict ? 2 : 1);
  for (size_t i = first; i < stack_.size(); ++i) include(&values_[target], stack_[i]);
  if (values_[target].part) fail("it changes what is part of something already");
  stack_.resize(first);
}

/// Keys may all have the same hash; then each is compared with all previous ones. Text hashes are random.
void PickleChecker::count_keys(size_t first, size_t step) {
  if (!metadata_) return;
  for (size_t i = first; i < stack_.size(); i += step) {
    const Value& key = values_[stack_[i]];
    if (key.kind == Kind::kText || key.kind == Kind::kBytes || key.kind == Kind::kCounted) continue;
    comparisons_ += ++keys_ * key.weight;
    if (comparisons_ > limit_) fail("it has too many keys that are no texts");
  }
}

void PickleChecker::call(Kind made) {
  const uint32_t arguments = pop();
  const uint32_t callable = pop();
  if (values_[callable].kind != Kind::kGlobal) fail("what it calls is no class or function");
  if (values_[arguments].kind != Kind::kTuple) fail("its arguments are no tuple");
  if (values_[arguments].has_range) fail("a range would be written out");
  if (values_[callable].makes == Makes::kBytes && values_[arguments].has_number) {
    fail("it makes as many bytes as a number says");
  }
  Value value(kind_made(values_[callable].makes, made));
  include(&value, callable);
  include(&value, arguments);
  push(value);
}

void PickleChecker::call_with_names() {
  const uint32_t names = pop();
  if (values_[names].kind != Kind::kDict) fail("its named arguments are no dict");
  call(Kind::kNew);
  include(&values_[top()], names);
}

void PickleChecker::persistent() {
  Value storage(Kind::kPlain);
  include(&storage, pop());
  push(storage);
}

void PickleChecker::build() {
  const uint32_t state = pop();
  const uint32_t target = top();
  const Kind kind = values_[target].kind;
  const bool is_new = kind == Kind::kNew || kind == Kind::kCounted;
  if (!is_new && (metadata_ || kind != Kind::kMade)) fail("what it changes is no new object");
  include(&values_[target], state);
  if (values_[target].part) fail("it changes what is part of something already");
}

uint32_t PickleChecker::top() const {
  if (stack_.size() <= fence()) fail("the stack is too short");
  return stack_.back();
}

uint32_t PickleChecker::pop() {
  const uint32_t value = top();
  stack_.pop_back();
  return value;
}

/// Where the last `count` values begin.
size_t PickleChecker::last(size_t count) const {
  if (stack_.size() - fence() < count) fail("the stack is too short");
  return stack_.size() - count;
}

size_t PickleChecker::pop_mark() {
  if (marks_.empty()) fail("there is no mark");
  const size_t mark = marks_.back();
  marks_.pop_back();
  return mark;
}

void PickleChecker::push(const Value& value) {
  if (value.weight > limit_) fail("it repeats itself beyond measure");
  stack_.push_back(static_cast<uint32_t>(values_.size()));
  values_.push_back(value);
}

void PickleChecker::include(Value* whole, uint32_t part) {
  Value& value = values_[part];
  value.part = true;
  whole->weight += value.weight;
  whole->depth = std::max<uint16_t>(whole->depth, value.depth + 1);
  if (whole->weight > limit_) fail("it repeats itself beyond measure");
  if (whole->depth > kDeepest) fail("it is nested too deep");
}

}  // namespace

size_t check_pickle(const uint8_t* data, size_t nbytes, PickleReader reader) {
  return PickleChecker(data, nbytes, reader).run();
}

}  // namespace ckpt_fast
