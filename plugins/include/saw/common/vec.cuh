// Several numbers that a thread moves at once.
#pragma once

namespace saw {

// So many numbers as a thread moves at once.
template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
    T at[N];
};
constexpr int kWide = 8;  // 16-bit numbers: 16 bytes

}  // namespace saw
