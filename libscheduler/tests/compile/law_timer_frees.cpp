// A clock takes the blocks from a reader.
// error: law 2: a peer may be reading, and nothing proves
#include "loan.hpp"
namespace loan {
inline constexpr auto more = rows_and<Read, Tick, Over>();
#ifdef MUST_NOT_COMPILE
static_assert(lawful<Loan<more>>());
#else
inline constexpr auto harmless = rows_and<Kept, Tick, Over>();
static_assert(lawful<Loan<harmless>>());
#endif
}  // namespace loan
