// The owner takes the blocks from a reader.
// error: law 2: a peer may be reading, and nothing proves
#include "loan.hpp"
namespace loan {
inline constexpr auto more = rows_and<Read, Take, Over>();
#ifdef MUST_NOT_COMPILE
static_assert(lawful<Loan<more>>());
#else
static_assert(lawful<Loan<rows>>());
#endif
}  // namespace loan
