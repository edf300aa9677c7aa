// SPDX-License-Identifier: Apache-2.0
// For device code that a test compiles for the CPU.
#pragma once

#ifdef __CUDACC__
#define CKPT_FAST_DEVICE __host__ __device__ __forceinline__
#else
#define CKPT_FAST_DEVICE inline
#endif
