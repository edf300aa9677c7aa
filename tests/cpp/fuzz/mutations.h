// SPDX-License-Identifier: Apache-2.0
// Changes of an input that know nothing of its format.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

using Bytes = std::vector<uint8_t>;
using Random = std::mt19937_64;

/// A number below `end`, which is not 0.
inline size_t below(Random& random, size_t end) { return static_cast<size_t>(random() % end); }

/// Changes one thing: a bit, a byte, a number of 1, 2, 4 or 8 bytes in either order, or a block, which is
/// left out, repeated, moved or filled anew; or cuts off the end.
void mutate(Random& random, Bytes* input);

/// Puts a part of `other` into the input, or in place of its end.
void splice(Random& random, const Bytes& other, Bytes* input);
