/* Fill an array with initial weights: stream format 2.
 *
 * What it computes. Element i (row-major index in the whole array) of the array named by (key, stream) is
 *
 *     UNIFORM            sample * scale           sample uniform in [-1, 1]
 *     TRUNCATED_NORMAL   sample * scale           sample normal, cut at two standard deviations, in units of that
 *     NORMAL             sample * scale + mean    sample normal
 *     UNIFORM_BETWEEN    sample * scale + mean    sample uniform in [-1, 1]; no weight below low or above high
 *     NORMAL_BETWEEN     sample * scale + mean    sample normal, cut anywhere; no weight below low or above high
 *
 * with the numbers that gpuinit/distributions.py and gpuinit/exact.py work out. The file is compiled once for the
 * first two, which take one number, and where it is asked for once more with SHIFTED defined, for the others. One
 * kernel for all would take longer to compile and more registers. Each of both is compiled again, where it is asked
 * for, with KEY_IN_MEMORY defined, see the launch contract, or with OUTER_AXES, for parts cut along more than two
 * axes.
 *
 * Element to counter. One Philox4x32-10 block is four 32-bit words for the counter (block, stream):
 *     float32, float16, bfloat16   element i  <-  word i % 4 of block i / 4
 *     float64                      element i  <-  words 2*(i % 2) (low), 2*(i % 2) + 1 (high) of block i / 2
 * The 16-bit types are the float32 weight rounded to nearest even. Nothing else enters: no grid, no block,
 * no thread, no device.
 *
 * What is written. `rows` runs of `length` elements each, one after another in `out`; row r starts at global
 * element offset + r * row_stride, or with OUTER_AXES where row_start says. A packet is 16 bytes of the whole
 * array, aligned in it (4, 8 or 2 elements); a thread makes one packet at a time and stores it at once where the
 * row has it whole and `out` has it aligned, else element by element. With KEY_IN_MEMORY the offset is the sum of
 * `offset` and of the one in memory.
 *
 * Launch contract. The x dimension of grid and block walks the packets of a row, y the rows; blocks have at
 * most BLOCK_SIZE threads. Any grid and any block give the same bits. `key` is the number itself. With
 * KEY_IN_MEMORY it is the address, aligned to 16 bytes, of four words that the host need not know: the key, its
 * high word first, and an offset, likewise. Nothing may write them while the kernel runs, so they are not in `out`.
 *
 * Exactness. Every float operation is a separate IEEE round-to-nearest one in a fixed order, spelled as an
 * intrinsic, which no compiler fuses; compile with --fmad=false as well. Only `reciprocal` fuses, by name. CuPy
 * adds -ftz=true, which cannot matter inside the sampler (nothing there is subnormal but an exact 0) and is kept
 * from the last operations by to_weight. No header is included, as CuPy may find none: gpuinit/backends/cuda.py puts
 * kernels/normal_tables.cuh before this file.
 *
 * Sources. Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11. The
 * quantile coefficients: tools/fit_quantile.py, tools/make_normal_tables.py. Twins: gpuinit/quantile.py and
 * gpuinit/compiled.py have the same names in the same order, and the tests compare them by bytes.
 *
 * SPDX-License-Identifier: Apache-2.0
 */

typedef unsigned long long uint64;
typedef unsigned int uint32;
typedef unsigned short uint16;

#define BLOCK_SIZE 256 /* gpuinit/backends/cuda.py launches this many threads a block */

#define SPAN 0x8000000u /* blocks; see store_whole */

#define UNIFORM 0
#define TRUNCATED_NORMAL 1
#define NORMAL 2
#define UNIFORM_BETWEEN 3
#define NORMAL_BETWEEN 4

/* Multipliers and Weyl increments of philox4x32 (SC'11, section 3.3): the increments are the fractions of
 * the golden ratio and of sqrt(3), times 2**32. */
#define PHILOX_M0 0xD2511F53u
#define PHILOX_M1 0xCD9E8D57u
#define PHILOX_W0 0x9E3779B9u
#define PHILOX_W1 0xBB67AE85u
#define PHILOX_ROUNDS 10

/* R(t) = R0 + R1*t + N*(R2 + R3/Q), Y = (Y0 - t)*(Y1 - t), N = Y + N0, Q = Y*(Q1 - t) + Q0 in float32, with
 * a weighted relative error of 1.7e-7 (tools/fit_quantile.py). */
#define R0 0.41277757f
#define R1 0.04760623f
#define R2 0.0046481327f
#define R3 0.30843925f
#define Y0 0.96703994f
#define Y1 1.5457196f
#define N0 0.06913901f
#define Q0 0.043334197f
#define Q1 1.7829732f

/* R(v) = R0 + R1*N/Q, N and Q monic polynomials in v = 1 - t, in float64, weighted relative error 9.3e-18,
 * constants first (tools/fit_quantile.py). In constant memory: an instruction has no room for a double. */
static __constant__ double R64[] = {0.10441156857015813, 4.542458417924603};
static __constant__ double N64[] = {
    0.002425975850266509, 0.08301813801091237, 1.1406042206919167, 8.103931143111144, 32.062861048550324,
    71.20019308647001, 85.66270153974064, 51.47534857961033, 13.189084017454736,
};
static __constant__ double Q64[] = {
    0.012304641324063564, 0.4445631917015149, 6.517378109542563, 50.104883348364446, 218.5920655295031,
    549.5499832962482, 778.0011993750466, 584.8669118160961, 209.70818874502353, 29.332203457829202,
};

/* Of one distribution, in the type of the sample, Word the signed integer as wide. The last six are those of
 * NORMAL_BETWEEN, whose samples are negative for words below `split`. The probability between a sample and
 * the mean, and that of the tail beyond it, grow by `step` a word, the one away from the mean from `start` on, the
 * other towards it from `tail` on, all in units of 2**-31 (2**-63). */
template <class Sample, class Word>
struct Numbers {
    Sample scale, mean, low, high, step, start_above, start_below, tail_above, tail_below;
    Word split;
};
typedef Numbers<float, int> Numbers32;
typedef Numbers<double, long long> Numbers64;

#ifdef KEY_IN_MEMORY
typedef const uint4 *Key; /* key and offset, the high word of each first */
#else
typedef uint64 Key;
#endif

/* Where rows start. With OUTER_AXES they are groups of rows_each, which start a stride apart along each of the
 * outer axes, the innermost first. Axes that are not there have length 1. */
#ifdef OUTER_AXES
struct Strides {
    uint64 row_stride, rows_each, length1, stride1, length2, stride2, length3, stride3, length4, stride4;
};
#else
typedef uint64 Strides;
#endif

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

/* Y, which N and Q share. */
static __device__ float quadratic(float t) { return multiply(add(Y0, -t), add(Y1, -t)); }

static __device__ float denominator(float t, float y) { return add(multiply(y, add(Q1, -t)), Q0); }

/* a + b, from 0 to 1: the adder does it in the same instruction. */
static __device__ float add_within_0_and_1(float a, float b)
{
#ifdef __CUDA_ARCH__
    float sum;
    asm("add.rn.ftz.sat.f32 %0, %1, %2;" : "=f"(sum) : "f"(a), "f"(b));
    return sum;
#else
    return a + b < 1.0f ? a + b : 1.0f;
#endif
}

/* 1 / x rounded to nearest, for x from 2**-100 to 2**100: the device's approximation y, which is within one
 * unit in the last place, and one Newton step. These are the operations that __frcp_rn has for such x, without
 * its test of the range; the tests try every mantissa with every such y. */
static __device__ float reciprocal(float x)
{
#ifdef __CUDA_ARCH__
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
#else
    float y = host_approximate_reciprocal(x);
#endif
    return __fmaf_rn(y, __fmaf_rn(-x, y, 1.0f), y);
}

/* The truncated normal sample in units of its bound. The cut at 1 is what proves |sample| <= 1. */
static __device__ float quantile(float u, float t, float y, float r3_by_q)
{
    float line = add(multiply(t, R1), R0);
    return multiply(u, add_within_0_and_1(multiply(add(y, N0), add(r3_by_q, R2)), line));
}

/* The four samples of one block. One reciprocal serves them: 1/q0 = q1 * ((q2*q3) / (q0*q1*q2*q3)). A
 * denominator is between 0.029 and 2.71, their product between 7e-7 and 54. */
static __device__ float4 truncated_normal(float4 u)
{
    float4 t = make_float4(multiply(u.x, u.x), multiply(u.y, u.y), multiply(u.z, u.z), multiply(u.w, u.w));
    float4 y = make_float4(quadratic(t.x), quadratic(t.y), quadratic(t.z), quadratic(t.w));
    float4 q = make_float4(denominator(t.x, y.x), denominator(t.y, y.y), denominator(t.z, y.z),
                           denominator(t.w, y.w));
    float q_xy = multiply(q.x, q.y);
    float q_zw = multiply(q.z, q.w);
    float inverse = multiply(reciprocal(multiply(q_xy, q_zw)), R3);
    float inverse_xy = multiply(inverse, q_zw);
    float inverse_zw = multiply(inverse, q_xy);
    return make_float4(quantile(u.x, t.x, y.x, multiply(inverse_xy, q.y)),
                       quantile(u.y, t.y, y.y, multiply(inverse_xy, q.x)),
                       quantile(u.z, t.z, y.z, multiply(inverse_zw, q.w)),
                       quantile(u.w, t.w, y.w, multiply(inverse_zw, q.z)));
}

#ifdef SHIFTED

/* R of tail probability a, in units of 2**-unit: the polynomial of its segment (tools/make_normal_tables.py). */
static __device__ float ratio(float a, uint32 unit)
{
    uint32 bits = __float_as_uint(a);
    float4 c = __ldg((const float4 *)NORMAL32[(bits >> 20) - (127 + unit - 64) * 8]);
    float t = __uint_as_float((bits & 0xFFFFF) | 0x3F800000);
    return add(multiply(add(multiply(add(multiply(c.w, t), c.z), t), c.y), t), c.x);
}

/* The normal sample: u * R(1 - |u|), u = s / (2**31 + 1/2) for the word as a signed integer s. For s = 0, u is 0,
 * and the tail wraps round to something finite. */
static __device__ float normal(uint32 word)
{
    int s = (int)word;
    uint32 magnitude = s < 0 ? 0u - word : word;
    float a = __uint2float_rn(1u - 2u * magnitude);
    return multiply(__int2float_rn(s), ratio(a, 32));
}

/* The normal sample between two bounds: that of the middle of the word's share of the probability. Distances of
 * words are exact, so that no sample loses digits, near the mean or far out. */
static __device__ float normal_between(uint32 word, Numbers32 n)
{
    int s = (int)word;
    uint32 below = s < n.split ? 0xFFFFFFFFu : 0u;
    float u = add(multiply(__uint2float_rn((word - (uint32)n.split) ^ below), n.step),
                  below ? n.start_below : n.start_above);
    float a = add(multiply(__uint2float_rn(word ^ 0x7FFFFFFFu ^ below), n.step),
                  below ? n.tail_below : n.tail_above);
    return multiply(__uint_as_float(__float_as_uint(u) ^ (below & 0x80000000u)), ratio(a, 31));
}

#endif

/* The last operations, which keep subnormal numbers: PTX without .ftz does so whatever the flags. */
static __device__ float multiply_to_weight(float sample, float scale)
{
#ifdef __CUDA_ARCH__
    float weight;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(weight) : "f"(sample), "f"(scale));
    return weight;
#else
    return sample * scale;
#endif
}

static __device__ float add_to_weight(float product, float mean)
{
#ifdef __CUDA_ARCH__
    float weight;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(weight) : "f"(product), "f"(mean));
    return weight;
#else
    return product + mean;
#endif
}

static __device__ float cut_weight(float weight, float low, float high)
{
#ifdef __CUDA_ARCH__
    asm("max.f32 %0, %0, %1;" : "+f"(weight) : "f"(low));
    asm("min.f32 %0, %0, %1;" : "+f"(weight) : "f"(high));
    return weight;
#else
    weight = weight > low ? weight : low;
    return weight < high ? weight : high;
#endif
}

static __device__ float to_weight(float sample, uint32 distribution, Numbers32 n)
{
    float weight = multiply_to_weight(sample, n.scale);
    if (distribution >= NORMAL)
        weight = add_to_weight(weight, n.mean);
    if (distribution >= UNIFORM_BETWEEN)
        weight = cut_weight(weight, n.low, n.high);
    return weight;
}

static __device__ float sample(uint32 word, uint32 distribution, Numbers32 n)
{
#ifdef SHIFTED
    if (distribution == NORMAL)
        return normal(word);
    if (distribution == NORMAL_BETWEEN)
        return normal_between(word, n);
#endif
    return uniform(word);
}

static __device__ float4 weights(uint64 block, uint64 stream, uint64 key, uint32 distribution, Numbers32 n)
{
    uint4 words = philox4x32(block, stream, key);
    float4 w = make_float4(sample(words.x, distribution, n), sample(words.y, distribution, n),
                           sample(words.z, distribution, n), sample(words.w, distribution, n));
    if (distribution == TRUNCATED_NORMAL)
        w = truncated_normal(w);
    return make_float4(to_weight(w.x, distribution, n), to_weight(w.y, distribution, n),
                       to_weight(w.z, distribution, n), to_weight(w.w, distribution, n));
}

/* u in [-1, 1] from 64 bits, as for 32. */
static __device__ double uniform64(uint32 low, uint32 high)
{
    return multiply64(__ll2double_rn((long long)((uint64)high << 32 | low)), 0x1p-63);
}

static __device__ double numerator64(double v)
{
    double n = multiply64(add64(v, N64[8]), v);
    n = multiply64(add64(n, N64[7]), v);
    n = multiply64(add64(n, N64[6]), v);
    n = multiply64(add64(n, N64[5]), v);
    n = multiply64(add64(n, N64[4]), v);
    n = multiply64(add64(n, N64[3]), v);
    n = multiply64(add64(n, N64[2]), v);
    n = multiply64(add64(n, N64[1]), v);
    return add64(n, N64[0]);
}

static __device__ double denominator64(double v)
{
    double q = multiply64(add64(v, Q64[9]), v);
    q = multiply64(add64(q, Q64[8]), v);
    q = multiply64(add64(q, Q64[7]), v);
    q = multiply64(add64(q, Q64[6]), v);
    q = multiply64(add64(q, Q64[5]), v);
    q = multiply64(add64(q, Q64[4]), v);
    q = multiply64(add64(q, Q64[3]), v);
    q = multiply64(add64(q, Q64[2]), v);
    q = multiply64(add64(q, Q64[1]), v);
    return add64(q, Q64[0]);
}

static __device__ double quantile64(double u, double n, double r1_by_q)
{
    double ratio = add64(multiply64(n, r1_by_q), R64[0]);
    return multiply64(u, ratio < 1.0 ? ratio : 1.0);
}

/* The two samples of one block, with one reciprocal. */
static __device__ double2 truncated_normal64(double2 u)
{
    double2 v = make_double2(add64(1.0, -multiply64(u.x, u.x)), add64(1.0, -multiply64(u.y, u.y)));
    double2 q = make_double2(denominator64(v.x), denominator64(v.y));
    double inverse = multiply64(__drcp_rn(multiply64(q.x, q.y)), R64[1]);
    return make_double2(quantile64(u.x, numerator64(v.x), multiply64(inverse, q.y)),
                        quantile64(u.y, numerator64(v.y), multiply64(inverse, q.x)));
}

#ifdef SHIFTED

static __device__ double ratio64(double a, uint32 unit)
{
    uint64 bits = (uint64)__double_as_longlong(a);
    const double2 *row = (const double2 *)NORMAL64[(bits >> 48) - (1023 + unit - 96) * 16];
    double2 c01 = __ldg(row), c23 = __ldg(row + 1), c45 = __ldg(row + 2), c67 = __ldg(row + 3);
    double t = add64(__longlong_as_double((long long)((bits & 0xFFFFFFFFFFFF) | 0x3FF0000000000000)), -1.0);
    double r = add64(multiply64(c67.y, t), c67.x);
    r = add64(multiply64(r, t), c45.y);
    r = add64(multiply64(r, t), c45.x);
    r = add64(multiply64(r, t), c23.y);
    r = add64(multiply64(r, t), c23.x);
    r = add64(multiply64(r, t), c01.y);
    return add64(multiply64(r, t), c01.x);
}

static __device__ double normal64(uint32 low, uint32 high)
{
    uint64 word = (uint64)high << 32 | low;
    long long s = (long long)word;
    uint64 magnitude = s < 0 ? 0ull - word : word;
    double a = __ull2double_rn(1ull - 2ull * magnitude);
    return multiply64(__ll2double_rn(s), ratio64(a, 64));
}

static __device__ double normal_between64(uint32 low, uint32 high, Numbers64 n)
{
    uint64 word = (uint64)high << 32 | low;
    long long s = (long long)word;
    uint64 below = s < n.split ? ~0ull : 0ull;
    double u = add64(multiply64(__ull2double_rn((word - (uint64)n.split) ^ below), n.step),
                     below ? n.start_below : n.start_above);
    double a = add64(multiply64(__ull2double_rn(word ^ 0x7FFFFFFFFFFFFFFFull ^ below), n.step),
                     below ? n.tail_below : n.tail_above);
    return multiply64(below ? -u : u, ratio64(a, 63));
}

#endif

static __device__ double to_weight64(double sample, uint32 distribution, Numbers64 n)
{
    double weight = multiply64(sample, n.scale);
    if (distribution >= NORMAL)
        weight = add64(weight, n.mean);
    if (distribution >= UNIFORM_BETWEEN) {
        weight = weight > n.low ? weight : n.low;
        weight = weight < n.high ? weight : n.high;
    }
    return weight;
}

static __device__ double sample64(uint32 low, uint32 high, uint32 distribution, Numbers64 n)
{
#ifdef SHIFTED
    if (distribution == NORMAL)
        return normal64(low, high);
    if (distribution == NORMAL_BETWEEN)
        return normal_between64(low, high, n);
#endif
    return uniform64(low, high);
}

static __device__ double2 weights64(uint64 block, uint64 stream, uint64 key, uint32 distribution, Numbers64 n)
{
    uint4 words = philox4x32(block, stream, key);
    double2 w = make_double2(sample64(words.x, words.y, distribution, n), sample64(words.z, words.w, distribution, n));
    if (distribution == TRUNCATED_NORMAL)
        w = truncated_normal64(w);
    return make_double2(to_weight64(w.x, distribution, n), to_weight64(w.y, distribution, n));
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

/* One packet: the weights of `block`, and of the next one for the 16-bit types, whose `block` is even. */
static __device__ uint4 packet_float32(uint64 block, uint64 stream, uint64 key, uint32 distribution, Numbers32 n)
{
    float4 w = weights(block, stream, key, distribution, n);
    return make_uint4(__float_as_uint(w.x), __float_as_uint(w.y), __float_as_uint(w.z), __float_as_uint(w.w));
}

static __device__ uint4 packet_float16(uint64 block, uint64 stream, uint64 key, uint32 distribution, Numbers32 n)
{
    float4 a = weights(block, stream, key, distribution, n);
    float4 b = weights(block | 1, stream, key, distribution, n);
    return make_uint4(round_to_float16(a.x, a.y), round_to_float16(a.z, a.w), round_to_float16(b.x, b.y),
                      round_to_float16(b.z, b.w));
}

static __device__ uint4 packet_bfloat16(uint64 block, uint64 stream, uint64 key, uint32 distribution, Numbers32 n)
{
    float4 a = weights(block, stream, key, distribution, n);
    float4 b = weights(block | 1, stream, key, distribution, n);
    return make_uint4(round_to_bfloat16(a.x, a.y), round_to_bfloat16(a.z, a.w), round_to_bfloat16(b.x, b.y),
                      round_to_bfloat16(b.z, b.w));
}

static __device__ uint4 packet_float64(uint64 block, uint64 stream, uint64 key, uint32 distribution, Numbers64 n)
{
    double2 w = weights64(block, stream, key, distribution, n);
    uint4 packet;
    memcpy(&packet, &w, 16);
    return packet;
}

/* The packets of one row. Lane j of packet i is element i * lanes + j - phase of the row. */
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

/* How far row y starts from row 0. */
static __device__ uint64 row_start(uint64 y, Strides s)
{
#ifdef OUTER_AXES
    uint64 group = y / s.rows_each;
    uint64 start = y % s.rows_each * s.row_stride + group % s.length1 * s.stride1;
    group /= s.length1;
    start += group % s.length2 * s.stride2;
    group /= s.length2;
    start += group % s.length3 * s.stride3;
    return start + group / s.length3 % s.length4 * s.stride4;
#else
    return y * s;
#endif
}

static __device__ uint64 thread_x() { return (uint64)blockIdx.x * blockDim.x + threadIdx.x; }
static __device__ uint64 thread_y() { return (uint64)blockIdx.y * blockDim.y + threadIdx.y; }
static __device__ uint64 threads_x() { return (uint64)gridDim.x * blockDim.x; }
static __device__ uint64 threads_y() { return (uint64)gridDim.y * blockDim.y; }

/* Store the packets of `count` blocks, the first of them at `out`. This is the loop where the time goes. It
 * walks spans of blocks whose numbers differ in the low bits alone, and counts these in 32 bits: what depends
 * on the other bits only, as most of the first two rounds of Philox does, leaves the loop. Two turns at once
 * keep the round keys in registers. */
template <auto packet, class Element, class Numbers>
static __device__ void store_whole(Element *out, uint64 block, uint64 count, uint64 stream, uint64 key,
                                   uint32 distribution, Numbers n)
{
    const uint32 blocks = sizeof(Element) == 2 ? 2 : 1; /* of a packet */
    const uint32 lanes = 16 / sizeof(Element) / blocks; /* of a block */
    uint32 step = threads_x() < SPAN / blocks ? (uint32)threads_x() * blocks : SPAN;
    uint32 from = block % SPAN;
    uint64 span = block - from;
    Element *span_out = out - (uint64)from * lanes; /* where block number `span` would be */
    while (count) {
        uint32 here = count < SPAN - from ? (uint32)count : SPAN - from;
        if (thread_x() < here / blocks) {
#pragma unroll 2
            for (uint32 i = from + (uint32)thread_x() * blocks; i < from + here; i += step)
                *(uint4 *)(span_out + (uint64)i * lanes) = packet(span | i, stream, key, distribution, n);
        }
        count -= here;
        from = 0;
        span += SPAN;
        span_out += (uint64)SPAN * lanes;
    }
}

/* Store what `out` has of one packet: lane j is element first + j of the row, and written iff that is < length
 * as an unsigned number: lanes before the row's start wrap round to huge ones. */
template <class Element>
static __device__ void store_part(Element *out, uint64 first, uint64 length, uint4 packet)
{
    const int lanes = 16 / sizeof(Element);
    Element elements[lanes];
    memcpy(elements, &packet, 16);
#pragma unroll
    for (int lane = 0; lane < lanes; ++lane)
        if (first + lane < length)
            out[first + lane] = elements[lane];
}

template <auto packet, class Element, class Numbers>
static __device__ void fill(Element *out, uint64 offset, uint64 length, uint64 rows, Strides strides, Key given,
                            uint64 stream, uint32 distribution, Numbers n)
{
#ifdef KEY_IN_MEMORY
    uint4 words = *given; /* not __ldg, whose words the compiler keeps in more registers */
    uint64 key = (uint64)words.x << 32 | words.y;
    offset += (uint64)words.z << 32 | words.w;
#else
    uint64 key = given;
#endif
    const uint32 lanes = 16 / sizeof(Element);
    const uint32 blocks = sizeof(Element) == 2 ? 2 : 1;
    for (uint64 y = thread_y(); y < rows; y += threads_y()) {
        Element *row_out = out + y * length;
        Row row = locate(row_out, offset + row_start(y, strides), length, lanes);
        Element *whole_out = row_out + (row.whole_from * lanes - row.phase);
        uint64 block = (row.first_packet + row.whole_from) * blocks;
        uint64 count = row.whole * blocks;
        /* One loop for each distribution, so that none is asked for inside. */
#ifdef SHIFTED
        if (distribution == NORMAL_BETWEEN)
            store_whole<packet>(whole_out, block, count, stream, key, NORMAL_BETWEEN, n);
        else if (distribution == UNIFORM_BETWEEN)
            store_whole<packet>(whole_out, block, count, stream, key, UNIFORM_BETWEEN, n);
        else
            store_whole<packet>(whole_out, block, count, stream, key, NORMAL, n);
#else
        if (distribution == TRUNCATED_NORMAL)
            store_whole<packet>(whole_out, block, count, stream, key, TRUNCATED_NORMAL, n);
        else
            store_whole<packet>(whole_out, block, count, stream, key, UNIFORM, n);
#endif
        /* The other packets go to the last threads, which had the fewest whole ones. */
        for (uint64 j = threads_x() - 1 - thread_x(); j < row.packets - row.whole; j += threads_x()) {
            uint64 i = j < row.whole_from ? j : j + row.whole;
            uint4 part = packet((row.first_packet + i) * blocks, stream, key, distribution, n);
            store_part(row_out, i * lanes - row.phase, length, part);
        }
    }
}

#ifdef SHIFTED
#define PARAMETERS(Sample, Word)                                                                                  \
    Sample scale, Sample mean, Sample low, Sample high, Sample step, Sample start_above, Sample start_below,      \
        Sample tail_above, Sample tail_below, Word split
#define NUMBERS {scale, mean, low, high, step, start_above, start_below, tail_above, tail_below, split}
#else
#define PARAMETERS(Sample, Word) Sample scale
#define NUMBERS {scale}
#endif

#ifdef OUTER_AXES
#define STRIDE_PARAMETERS                                                                                         \
    uint64 row_stride, uint64 rows_each, uint64 length1, uint64 stride1, uint64 length2, uint64 stride2,          \
        uint64 length3, uint64 stride3, uint64 length4, uint64 stride4
#define STRIDES Strides{row_stride, rows_each, length1, stride1, length2, stride2, length3, stride3, length4, stride4}
#else
#define STRIDE_PARAMETERS uint64 row_stride
#define STRIDES row_stride
#endif

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE)
    fill_float32(float *out, uint64 offset, uint64 length, uint64 rows, STRIDE_PARAMETERS, Key key, uint64 stream,
                 uint32 distribution, PARAMETERS(float, int))
{
    fill<packet_float32>(out, offset, length, rows, STRIDES, key, stream, distribution, Numbers32 NUMBERS);
}

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE)
    fill_float16(uint16 *out, uint64 offset, uint64 length, uint64 rows, STRIDE_PARAMETERS, Key key, uint64 stream,
                 uint32 distribution, PARAMETERS(float, int))
{
    fill<packet_float16>(out, offset, length, rows, STRIDES, key, stream, distribution, Numbers32 NUMBERS);
}

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE)
    fill_bfloat16(uint16 *out, uint64 offset, uint64 length, uint64 rows, STRIDE_PARAMETERS, Key key, uint64 stream,
                  uint32 distribution, PARAMETERS(float, int))
{
    fill<packet_bfloat16>(out, offset, length, rows, STRIDES, key, stream, distribution, Numbers32 NUMBERS);
}

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE)
    fill_float64(double *out, uint64 offset, uint64 length, uint64 rows, STRIDE_PARAMETERS, Key key, uint64 stream,
                 uint32 distribution, PARAMETERS(double, long long))
{
    fill<packet_float64>(out, offset, length, rows, STRIDES, key, stream, distribution, Numbers64 NUMBERS);
}
