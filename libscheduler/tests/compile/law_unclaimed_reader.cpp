// A peer may read what only its owner kept.
// error: law 2: a peer may read what it did not claim
#include "loan.hpp"
namespace loan {
struct Shown {
  static constexpr std::string_view name = "Tick";
#ifdef MUST_NOT_COMPILE
  static constexpr EventFacts facts{.party = Party::owner};
#else
  static constexpr EventFacts facts{.party = Party::anyone};
#endif
};
inline constexpr auto more = rows_and<Kept, Shown, Read>();
static_assert(lawful<Loan<more, Read, Shown>>());
}  // namespace loan
