/* The CUDA names that kernels/fill.cu uses, for a host compiler: the tests run the kernel on the CPU with it.
 * With FLUSH_TO_ZERO the float32 intrinsics flush subnormal numbers, as they do under the -ftz=true that CuPy
 * appends. Compile with contraction off. SPDX-License-Identifier: Apache-2.0 */

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __constant__
#define __global__
#define __launch_bounds__(threads)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct dim3 { unsigned x, y, z; };

static thread_local dim3 gridDim, blockDim, blockIdx, threadIdx;

static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline double2 make_double2(double x, double y) { return {x, y}; }

#ifdef FLUSH_TO_ZERO
static inline float flush(float x) { return fabsf(x) < FLT_MIN ? copysignf(0.0f, x) : x; }
#else
static inline float flush(float x) { return x; }
#endif
static inline float __fadd_rn(float a, float b) { return flush(flush(a) + flush(b)); }
static inline float __fmul_rn(float a, float b) { return flush(flush(a) * flush(b)); }
static inline float __frcp_rn(float a) { return flush(1.0f / flush(a)); }
static inline float __fmaf_rn(float a, float b, float c) { return flush(fmaf(flush(a), flush(b), flush(c))); }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __drcp_rn(double a) { return 1.0 / a; }
static inline float __int2float_rn(int a) { return (float)a; }
static inline double __ll2double_rn(long long a) { return (double)a; }
static inline float __uint2float_rn(unsigned a) { return (float)a; }
static inline double __ull2double_rn(unsigned long long a) { return (double)a; }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }

static inline unsigned __float_as_uint(float a)
{
    unsigned bits;
    memcpy(&bits, &a, 4);
    return bits;
}

template <class To, class From>
static inline To bits_as(From a)
{
    To bits;
    memcpy(&bits, &a, sizeof bits);
    return bits;
}

static inline float __uint_as_float(unsigned a) { return bits_as<float>(a); }
static inline long long __double_as_longlong(double a) { return bits_as<long long>(a); }
static inline double __longlong_as_double(long long a) { return bits_as<double>(a); }

template <class T>
static inline T __ldg(const T *place)
{
    T value;
    memcpy(&value, place, sizeof value);
    return value;
}

/* One of the two floats next to 1 / x, as rcp.approx.ftz.f32 promises no more; by default both in turns. Below
 * is wrong for the mantissa of all ones alone, and no device has that: see tests/test_reciprocal.py. */
static inline float host_approximate_reciprocal(float x)
{
    double exact = 1.0 / (double)x;
    float below = (float)exact, above = (float)exact;
    if (below >= exact)
        below = nextafterf(below, 0.0f);
    if (above <= exact)
        above = nextafterf(above, INFINITY);
#if defined(APPROXIMATE_BELOW)
    return below;
#elif defined(APPROXIMATE_ABOVE)
    return above;
#else
    unsigned mantissa = __float_as_uint(x) & 0x7FFFFF;
    return mantissa % 2 ? above : below;
#endif
}

/* cvt.rn.f16.f32 for finite numbers, by exact arithmetic in double. */
static inline unsigned short host_float16_bits(float a)
{
    unsigned short sign = (unsigned short)(__float_as_uint(a) >> 16 & 0x8000);
    double magnitude = fabs((double)a);
    int exponent = magnitude < 0x1p-14 ? -14 : ilogb(magnitude);
    double units = nearbyint(ldexp(magnitude, 10 - exponent)); /* to even, the default rounding */
    if (exponent == -14)
        return sign | (unsigned short)units;
    unsigned bits = (unsigned)(exponent + 14) * 1024 + (unsigned)units;
    return sign | (unsigned short)(bits < 0x7C00 ? bits : 0x7C00);
}
