// What was given back can be read again: an old message is a new one.
// error: the machine goes back
#include "loan.hpp"
namespace loan {
inline constexpr auto more = rows_and<Read, Done, Kept>();
inline constexpr auto forward = rows_and<Kept, Done, Over>();
#ifdef MUST_NOT_COMPILE
static_assert(lawful<Loan<more>>());
#else
static_assert(lawful<Loan<forward>>());
#endif
}  // namespace loan
