/* Fill an array with initial weights: stream format 1.
 *
 * What it computes. Element i (row-major index in the whole array) of the array named by (key, stream) is
 *
 *     weight = sample * limit,    sample in [-1, 1]
 *
 * where sample is uniform, or the normal distribution truncated at two standard deviations, in units of
 * that bound. limit is the largest magnitude a weight can have.
 *
 * Element to counter. One Philox4x32-10 block is four 32-bit words for the counter (block, stream):
 *     float32, float16, bfloat16   element i  <-  word i % 4 of block i / 4
 *     float64                      element i  <-  words 2*(i % 2) (low), 2*(i % 2) + 1 (high) of block i / 2
 * The 16-bit types are the float32 weight rounded to nearest even. Nothing else enters: no grid, no block,
 * no thread, no device.
 *
 * What is written. `rows` runs of `length` elements each, one after another in `out`; row r starts at global
 * element offset + r * row_stride. A packet is 16 bytes of the whole array, aligned in it (4, 8 or 2
 * elements); a thread makes one packet at a time and stores it at once where the row has it whole and `out`
 * has it aligned, else element by element.
 *
 * Launch contract. The x dimension of grid and block walks the packets of a row, y the rows; blocks have at
 * most BLOCK_SIZE threads. Any grid and any block give the same bits.
 *
 * Exactness. Every float operation is a separate IEEE round-to-nearest one in a fixed order, spelled as an
 * intrinsic, which no compiler fuses; compile with --fmad=false as well. CuPy adds -ftz=true, which cannot
 * matter inside the sampler (nothing there is subnormal but an exact 0) and is kept from the last product
 * by multiply_to_weight. No header is included: CuPy may find none.
 *
 * Sources. Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11. The
 * quantile coefficients: tools/fit_quantile.py. Twin: gpuinit/quantile.py has the same names in the same
 * order, and the tests compare the two by bytes.
 *
 * SPDX-License-Identifier: Apache-2.0
 */

typedef unsigned long long uint64;
typedef unsigned int uint32;
typedef unsigned short uint16;

#define BLOCK_SIZE 256 /* gpuinit/backends/cuda.py launches this many threads a block */

#define UNIFORM 0
#define TRUNCATED_NORMAL 1

/* Multipliers and Weyl increments of philox4x32 (SC'11, section 3.3): the increments are the fractions of
 * the golden ratio and of sqrt(3), times 2**32. */
#define PHILOX_M0 0xD2511F53u
#define PHILOX_M1 0xCD9E8D57u
#define PHILOX_W0 0x9E3779B9u
#define PHILOX_W1 0xBB67AE85u
#define PHILOX_ROUNDS 10

/* R(v) = P(v)/Q(v) in float32, relative error 7.3e-8 (tools/fit_quantile.py). */
#define P0 0.09126182f
#define P1 1.1120256f
#define P2 3.4368744f
#define P3 2.5214055f
#define P4 0.20533383f
#define Q0 0.09126182f
#define Q1 1.2680678f
#define Q2 4.831078f
#define Q3 5.1258583f

/* R(v) = P(v)/Q(v) in float64, relative error 7.2e-18, constant first (tools/fit_quantile.py). */
#define P64_0 0.012972411312794016
#define P64_1 0.44511913530726677
#define P64_2 6.138307102239534
#define P64_3 43.844162448203335
#define P64_4 174.84171944281806
#define P64_5 393.0584632004382
#define P64_6 482.53567887695226
#define P64_7 300.5202791102226
#define P64_8 82.7780024537458
#define P64_9 7.638722566804412
#define P64_10 0.10408770881319832
#define Q64_0 0.012972411312794016
#define Q64_1 0.4673001400527829
#define Q64_2 6.827259552312625
#define Q64_3 52.28011698854188
#define Q64_4 227.05006713244106
#define Q64_5 567.883983210436
#define Q64_6 799.349934192021
#define Q64_7 597.1511740409888
#define Q64_8 212.68095413312133
#define Q64_9 29.54093152000372

static __device__ float add(float a, float b) { return __fadd_rn(a, b); }
static __device__ float multiply(float a, float b) { return __fmul_rn(a, b); }
static __device__ double add64(double a, double b) { return __dadd_rn(a, b); }
static __device__ double multiply64(double a, double b) { return __dmul_rn(a, b); }

static __device__ uint4 philox4x32(uint64 block, uint64 stream, uint64 key)
{
    uint32 c0 = (uint32)block, c1 = (uint32)(block >> 32);
    uint32 c2 = (uint32)stream, c3 = (uint32)(stream >> 32);
    uint32 k0 = (uint32)key, k1 = (uint32)(key >> 32);
#pragma unroll
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        uint32 high0 = __umulhi(PHILOX_M0, c0), low0 = PHILOX_M0 * c0;
        uint32 high1 = __umulhi(PHILOX_M1, c2), low1 = PHILOX_M1 * c2;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += PHILOX_W0;
        k1 += PHILOX_W1;
    }
    return make_uint4(c0, c1, c2, c3);
}

/* u in [-1, 1]: the word as a signed integer, in units of 2**31. Both ends are reached. */
static __device__ float uniform(uint32 word)
{
    return multiply(__int2float_rn((int)word), 0x1p-31f);
}

static __device__ float numerator(float v)
{
    float p = multiply(P4, v);
    p = multiply(add(p, P3), v);
    p = multiply(add(p, P2), v);
    p = multiply(add(p, P1), v);
    return add(p, P0);
}

static __device__ float denominator(float v)
{
    float q = multiply(add(v, Q3), v);
    q = multiply(add(q, Q2), v);
    q = multiply(add(q, Q1), v);
    return add(q, Q0);
}

/* a * b, at most 1, for a, b >= 0: the multiplier does it in the same instruction. */
static __device__ float multiply_to_at_most_1(float a, float b)
{
#ifdef __CUDA_ARCH__
    float product;
    asm("mul.rn.ftz.sat.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
    return product;
#else
    return a * b < 1.0f ? a * b : 1.0f;
#endif
}

/* The truncated normal sample in units of its bound. The cut at 1 is what proves |sample| <= 1. */
static __device__ float quantile(float u, float p, float inverse_q)
{
    return multiply(u, multiply_to_at_most_1(p, inverse_q));
}

/* The four samples of one block. One reciprocal serves them: 1/q0 = q1 * ((q2*q3) / (q0*q1*q2*q3)). */
static __device__ float4 truncated_normal(float4 u)
{
    float4 v, q;
    v.x = add(1.0f, -multiply(u.x, u.x));
    v.y = add(1.0f, -multiply(u.y, u.y));
    v.z = add(1.0f, -multiply(u.z, u.z));
    v.w = add(1.0f, -multiply(u.w, u.w));
    q.x = denominator(v.x);
    q.y = denominator(v.y);
    q.z = denominator(v.z);
    q.w = denominator(v.w);
    float q_xy = multiply(q.x, q.y);
    float q_zw = multiply(q.z, q.w);
    float inverse = __frcp_rn(multiply(q_xy, q_zw));
    float inverse_xy = multiply(inverse, q_zw);
    float inverse_zw = multiply(inverse, q_xy);
    return make_float4(quantile(u.x, numerator(v.x), multiply(inverse_xy, q.y)),
                       quantile(u.y, numerator(v.y), multiply(inverse_xy, q.x)),
                       quantile(u.z, numerator(v.z), multiply(inverse_zw, q.w)),
                       quantile(u.w, numerator(v.w), multiply(inverse_zw, q.z)));
}

/* sample * limit, subnormal results and limits kept: PTX without .ftz does so whatever the flags. */
static __device__ float multiply_to_weight(float sample, float limit)
{
#ifdef __CUDA_ARCH__
    float weight;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(weight) : "f"(sample), "f"(limit));
    return weight;
#else
    return sample * limit;
#endif
}

static __device__ float4 weights(uint64 block, uint64 stream, uint64 key, uint32 distribution, float limit)
{
    uint4 words = philox4x32(block, stream, key);
    float4 w = make_float4(uniform(words.x), uniform(words.y), uniform(words.z), uniform(words.w));
    if (distribution == TRUNCATED_NORMAL)
        w = truncated_normal(w);
    return make_float4(multiply_to_weight(w.x, limit), multiply_to_weight(w.y, limit),
                       multiply_to_weight(w.z, limit), multiply_to_weight(w.w, limit));
}

/* u in [-1, 1] from 64 bits, as for 32. */
static __device__ double uniform64(uint32 low, uint32 high)
{
    return multiply64(__ll2double_rn((long long)((uint64)high << 32 | low)), 0x1p-63);
}

static __device__ double numerator64(double v)
{
    double p = multiply64(P64_10, v);
    p = multiply64(add64(p, P64_9), v);
    p = multiply64(add64(p, P64_8), v);
    p = multiply64(add64(p, P64_7), v);
    p = multiply64(add64(p, P64_6), v);
    p = multiply64(add64(p, P64_5), v);
    p = multiply64(add64(p, P64_4), v);
    p = multiply64(add64(p, P64_3), v);
    p = multiply64(add64(p, P64_2), v);
    p = multiply64(add64(p, P64_1), v);
    return add64(p, P64_0);
}

static __device__ double denominator64(double v)
{
    double q = multiply64(add64(v, Q64_9), v);
    q = multiply64(add64(q, Q64_8), v);
    q = multiply64(add64(q, Q64_7), v);
    q = multiply64(add64(q, Q64_6), v);
    q = multiply64(add64(q, Q64_5), v);
    q = multiply64(add64(q, Q64_4), v);
    q = multiply64(add64(q, Q64_3), v);
    q = multiply64(add64(q, Q64_2), v);
    q = multiply64(add64(q, Q64_1), v);
    return add64(q, Q64_0);
}

static __device__ double truncated_normal64(double u)
{
    double v = add64(1.0, -multiply64(u, u));
    double ratio = multiply64(numerator64(v), __drcp_rn(denominator64(v)));
    return multiply64(u, ratio < 1.0 ? ratio : 1.0);
}

static __device__ double2 weights64(uint64 block, uint64 stream, uint64 key, uint32 distribution, double limit)
{
    uint4 words = philox4x32(block, stream, key);
    double2 w = make_double2(uniform64(words.x, words.y), uniform64(words.z, words.w));
    if (distribution == TRUNCATED_NORMAL)
        w = make_double2(truncated_normal64(w.x), truncated_normal64(w.y));
    return make_double2(multiply64(w.x, limit), multiply64(w.y, limit));
}

/* Two float32 weights rounded to nearest even into two 16-bit ones, the first in the low half. */
static __device__ uint32 round_to_float16(float first, float second)
{
    uint32 pair;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(first), "f"(second));
#elif defined(__CUDA_ARCH__)
    asm("{.reg .f16 low, high; cvt.rn.f16.f32 low, %1; cvt.rn.f16.f32 high, %2; mov.b32 %0, {low, high};}"
        : "=r"(pair)
        : "f"(first), "f"(second));
#else
    pair = host_float16_bits(first) | (uint32)host_float16_bits(second) << 16;
#endif
    return pair;
}

static __device__ uint32 round_to_bfloat16(float first, float second)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(first), "f"(second));
    return pair;
#else
    uint32 a = __float_as_uint(first), b = __float_as_uint(second);
    a += 0x7FFF + (a >> 16 & 1);
    b += 0x7FFF + (b >> 16 & 1);
    return a >> 16 | (b & 0xFFFF0000);
#endif
}

/* The packets of one row. Lane j of packet i is element i * lanes + j - phase of the row, and is written iff
 * that is < length as an unsigned number: lanes before the row's start wrap round to huge ones. */
struct Row {
    uint64 first_packet; /* of the whole array */
    uint64 packets;      /* that hold an element of the row */
    uint64 phase;        /* lanes of packet 0 that lie before the row's start */
    uint64 whole_from;   /* packets whole_from .. whole_from + whole - 1 are stored 16 bytes at once */
    uint64 whole;
};

static __device__ Row locate(const void *out, uint64 first, uint64 length, uint32 lanes)
{
    Row row;
    row.first_packet = first / lanes;
    row.phase = first % lanes;
    row.packets = (row.phase + length + lanes - 1) / lanes;
    row.whole_from = row.phase != 0;
    row.whole = (row.phase + length) / lanes;
    bool aligned = (((uint64)out - row.phase * (16 / lanes)) & 15) == 0;
    row.whole = aligned && row.whole > row.whole_from ? row.whole - row.whole_from : 0;
    return row;
}

static __device__ void store16(uint16 *out, Row row, uint64 packet, uint64 length, uint4 eight)
{
    uint64 in_row = packet * 8 - row.phase;
    out += in_row;
    if (packet - row.whole_from < row.whole) {
        *(uint4 *)out = eight;
    } else {
        uint32 pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (int lane = 0; lane < 8; ++lane)
            if (in_row + lane < length)
                out[lane] = (uint16)(pairs[lane / 2] >> 16 * (lane % 2));
    }
}

static __device__ void store32(float *out, Row row, uint64 packet, uint64 length, float4 four)
{
    uint64 in_row = packet * 4 - row.phase;
    out += in_row;
    if (packet - row.whole_from < row.whole) {
        *(float4 *)out = four;
    } else {
        float lanes[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int lane = 0; lane < 4; ++lane)
            if (in_row + lane < length)
                out[lane] = lanes[lane];
    }
}

static __device__ void store64(double *out, Row row, uint64 packet, uint64 length, double2 two)
{
    uint64 in_row = packet * 2 - row.phase;
    out += in_row;
    if (packet - row.whole_from < row.whole) {
        *(double2 *)out = two;
    } else {
        if (in_row < length)
            out[0] = two.x;
        if (in_row + 1 < length)
            out[1] = two.y;
    }
}

static __device__ uint64 thread_x() { return (uint64)blockIdx.x * blockDim.x + threadIdx.x; }
static __device__ uint64 thread_y() { return (uint64)blockIdx.y * blockDim.y + threadIdx.y; }
static __device__ uint64 threads_x() { return (uint64)gridDim.x * blockDim.x; }
static __device__ uint64 threads_y() { return (uint64)gridDim.y * blockDim.y; }

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE)
    fill_float32(float *out, uint64 offset, uint64 length, uint64 rows, uint64 row_stride, uint64 key, uint64 stream,
                 uint32 distribution, float limit)
{
    for (uint64 y = thread_y(); y < rows; y += threads_y()) {
        float *row_out = out + y * length;
        Row row = locate(row_out, offset + y * row_stride, length, 4);
        for (uint64 i = thread_x(); i < row.packets; i += threads_x()) {
            float4 four = weights(row.first_packet + i, stream, key, distribution, limit);
            store32(row_out, row, i, length, four);
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE)
    fill_float16(uint16 *out, uint64 offset, uint64 length, uint64 rows, uint64 row_stride, uint64 key, uint64 stream,
                 uint32 distribution, float limit)
{
    for (uint64 y = thread_y(); y < rows; y += threads_y()) {
        uint16 *row_out = out + y * length;
        Row row = locate(row_out, offset + y * row_stride, length, 8);
        for (uint64 i = thread_x(); i < row.packets; i += threads_x()) {
            uint64 block = 2 * (row.first_packet + i);
            float4 a = weights(block, stream, key, distribution, limit);
            float4 b = weights(block + 1, stream, key, distribution, limit);
            uint4 eight = make_uint4(round_to_float16(a.x, a.y), round_to_float16(a.z, a.w),
                                     round_to_float16(b.x, b.y), round_to_float16(b.z, b.w));
            store16(row_out, row, i, length, eight);
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE)
    fill_bfloat16(uint16 *out, uint64 offset, uint64 length, uint64 rows, uint64 row_stride, uint64 key, uint64 stream,
                  uint32 distribution, float limit)
{
    for (uint64 y = thread_y(); y < rows; y += threads_y()) {
        uint16 *row_out = out + y * length;
        Row row = locate(row_out, offset + y * row_stride, length, 8);
        for (uint64 i = thread_x(); i < row.packets; i += threads_x()) {
            uint64 block = 2 * (row.first_packet + i);
            float4 a = weights(block, stream, key, distribution, limit);
            float4 b = weights(block + 1, stream, key, distribution, limit);
            uint4 eight = make_uint4(round_to_bfloat16(a.x, a.y), round_to_bfloat16(a.z, a.w),
                                     round_to_bfloat16(b.x, b.y), round_to_bfloat16(b.z, b.w));
            store16(row_out, row, i, length, eight);
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE)
    fill_float64(double *out, uint64 offset, uint64 length, uint64 rows, uint64 row_stride, uint64 key, uint64 stream,
                 uint32 distribution, double limit)
{
    for (uint64 y = thread_y(); y < rows; y += threads_y()) {
        double *row_out = out + y * length;
        Row row = locate(row_out, offset + y * row_stride, length, 2);
        for (uint64 i = thread_x(); i < row.packets; i += threads_x()) {
            double2 two = weights64(row.first_packet + i, stream, key, distribution, limit);
            store64(row_out, row, i, length, two);
        }
    }
}
