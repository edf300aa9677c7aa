// SPDX-License-Identifier: Apache-2.0
// The pickle check on arbitrary bytes, which must not make it read out of bounds.
#include <stdexcept>

#include "check.h"
#include "engine/pickle/pickle_check.h"

using namespace ckpt_fast;

namespace {

bool passes(const std::vector<uint8_t>& content, PickleReader reader) {
  try {
    const size_t end = check_pickle(content.data(), content.size(), reader);
    CHECK(end >= 3 && end <= content.size() && content[end - 1] == '.');
    return true;
  } catch (const std::invalid_argument& error) {
    CHECK(std::string(error.what()).rfind("opcode 0x", 0) == 0);
    return false;
  }
}

}  // namespace

void test_pickle_check() {
  // {"key": m.n(1, "text") with an attribute, 2: [(True,), 0.0, m.n]}, of protocol 4.
  const std::string text(
      "\x80\x04}\x94(\x8c\x03key\x94\x8c\x01m\x94\x8c\x01n\x94\x93\x94K\x01\x8c\x04text\x86R\x94}\x8c\x01"
      "aJ\x01\0\0\0sbK\x02]\x94(\x88\x85G\0\0\0\0\0\0\0\0h\x04"
      "eu.",
      64);
  const std::vector<uint8_t> sound(text.begin(), text.end());
  CHECK(passes(sound, PickleReader::kArchive));
  for (const PickleReader reader : {PickleReader::kMetadata, PickleReader::kArchive}) {
    for (size_t nbytes = 0; nbytes < sound.size(); ++nbytes) {
      CHECK(!passes({sound.begin(), sound.begin() + static_cast<long>(nbytes)}, reader));
    }
    const std::vector<uint8_t> random = noise(60'000, 7);
    size_t passed = 0;
    for (size_t i = 0; i + 6 < random.size(); i += 6) {
      std::vector<uint8_t> damaged = sound;
      for (size_t change = 0; change < 3; ++change) damaged[random[i + change] % 64] = random[i + 3 + change];
      passed += passes(damaged, reader);
    }
    CHECK(passed < 10'000);
  }
}
