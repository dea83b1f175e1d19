/* Runs a __global__ function on the host: every thread of every block, one after another.
 * EXPORT(f) gives launch_f, and signature_f: one letter for each parameter. SPDX-License-Identifier: Apache-2.0 */

#include <tuple>
#include <utility>

static char letter(const volatile void *) { return 'p'; }
static char letter(const uint4 *) { return 'v'; } /* read 16 bytes at once, so aligned to them */
static char letter(uint32_t) { return 'I'; }
static char letter(unsigned long long) { return 'Q'; }
static char letter(int) { return 'i'; }
static char letter(long long) { return 'q'; }
static char letter(float) { return 'f'; }
static char letter(double) { return 'd'; }

template <class... Parameters, size_t... I>
static void launch(void (*kernel)(Parameters...), const unsigned *grid, const unsigned *block, void **arguments,
                   std::index_sequence<I...>)
{
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    for (unsigned b = 0; b < grid[0] * grid[1] * grid[2]; ++b)
        for (unsigned t = 0; t < block[0] * block[1] * block[2]; ++t) {
            blockIdx = {b % grid[0], b / grid[0] % grid[1], b / grid[0] / grid[1]};
            threadIdx = {t % block[0], t / block[0] % block[1], t / block[0] / block[1]};
            kernel(*(Parameters *)arguments[I]...);
        }
}

template <class... Parameters>
static void launch(void (*kernel)(Parameters...), const unsigned *grid, const unsigned *block, void **arguments)
{
    launch(kernel, grid, block, arguments, std::index_sequence_for<Parameters...>{});
}

template <class... Parameters>
static void signature(void (*)(Parameters...), char *letters)
{
    ((*letters++ = letter(Parameters())), ...);
}

#define EXPORT(kernel)                                                                                        \
    extern "C" void launch_##kernel(const unsigned *grid, const unsigned *block, void **arguments)            \
    {                                                                                                         \
        launch(kernel, grid, block, arguments);                                                               \
    }                                                                                                         \
    extern "C" void signature_##kernel(char *letters) { signature(kernel, letters); }
